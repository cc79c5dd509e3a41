"""What two headers have in common, and what not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .header import Header

__all__ = ["Change", "differences"]


@dataclass(frozen=True, slots=True)
class Change:
    """Something that one header has and the other has not, or has otherwise."""

    kind: str
    """request, structure or constant."""
    name: str
    before: str
    """How it is in the first; empty if it is not there."""
    after: str


def differences(before: Header, after: Header) -> list[Change]:
    """What changes from ``before`` to ``after``."""
    return [
        *_changes("request", _requests(before), _requests(after)),
        *_changes("structure", _structures(before), _structures(after)),
        *_changes("constant", before.constants, after.constants),
    ]


def _requests(header: Header) -> dict[str, str]:
    return {
        name: f"{each.number:#010x} {each.type_name or 'without argument'}" for name, each in header.requests.items()
    }


def _structures(header: Header) -> dict[str, str]:
    return {
        name: f"{size} bytes: " + ", ".join(f"{each.c_type} {each.name} at {each.offset}" for each in members)
        for name, (size, members) in header.structures.items()
    }


def _changes(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    names = [*before, *(name for name in after if name not in before)]
    return [
        Change(kind, name, str(before.get(name, "")), str(after.get(name, "")))
        for name in names
        if before.get(name) != after.get(name)
    ]
