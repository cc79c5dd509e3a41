"""What a kernel header defines: requests, structures, constants. What cannot be evaluated is listed, with why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .expressions import NotEvaluated, Request, evaluate, request_of
from .source import Block, Source, read_source

__all__ = ["Header", "Member", "read_header"]

_BASE = "".join(
    f"typedef {c_type} {name};\n"
    for bits, c_type in ((8, "uint8_t"), (16, "uint16_t"), (32, "uint32_t"), (64, "uint64_t"))
    for name in (f"__u{bits}", *(f"__{order}{bits}" for order in ("le", "be", "virtio") if bits > 8))
) + "".join(f"typedef int{bits}_t __s{bits};\n" for bits in (8, 16, 32, 64))
_NAMES = frozenset(re.findall(r"(\w+);", _BASE))
_ATTRIBUTES = re.compile(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|__packed\b|__user\b|__counted_by\w*\([^)]*\)")
_FLEXIBLE = re.compile(r"__DECLARE_FLEX_ARRAY\s*\(\s*([^,]+),\s*(\w+)\s*\)")
_ARRAY = re.compile(r"\[\s*([^\]\s][^\]]*?)\s*\]")
_ENUMERATOR = re.compile(r"(\w+)\s*(?:=\s*([^,]+))?")


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a structure; those of members without a name are its own."""

    name: str
    offset: int
    size_bytes: int
    c_type: str


@dataclass(slots=True)
class Header:
    """What the header at ``path`` and those that it includes define."""

    path: str
    requests: dict[str, Request] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    structures: dict[str, tuple[int, tuple[Member, ...]]] = field(default_factory=dict)
    """Name -> (size in bytes, members)."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Name -> why it was not evaluated."""
    ffi: Any = None
    """Makes values of the header's types (`cffi.FFI`)."""

    @property
    def collisions(self) -> list[tuple[str, str]]:
        """Pairs of requests with the same number."""
        first: dict[int, str] = {}
        return [
            (first[request.number], name)
            for name, request in self.requests.items()
            if first.setdefault(request.number, name) != name
        ]


def read_header(path: str) -> Header:
    """Read the header at ``path``. Raises `VdpaBridgeError` if it cannot be read."""
    import cffi  # takes a while to import

    source = read_source(Path(path))
    header = Header(path, ffi=cffi.FFI())
    header.ffi.cdef(_BASE)
    for block in source.blocks:
        try:
            _define(header, block, source)
        except NotEvaluated as error:
            header.unknown[f"{block.kind} {block.name}"] = str(error)

    def size_of(c_type: str) -> int:
        known = _ARRAY.sub(lambda match: f"[{evaluate(match[1], source.macros, header.constants)}]", c_type)
        return _size_of(header, known)

    for name, text in source.macros.items():
        try:
            request = request_of(name, text, source.macros, header.constants, size_of)
            if request is not None:
                header.requests[name] = request
            else:
                header.constants[name] = evaluate(text, source.macros, header.constants)
        except NotEvaluated as error:
            header.unknown[name] = str(error)
    return header


def _define(header: Header, block: Block, source: Source) -> None:
    """Add a structure, a union, a type's other name, or the numbers of an enumeration."""
    if block.kind == "enum":
        _enumerate(header, block, source)
        return
    body = _FLEXIBLE.sub(r"\1 \2[]", _ATTRIBUTES.sub("", block.body))
    if block.kind == "typedef":
        if block.name not in _NAMES:
            _declare(header, f"typedef {body};")
        return
    body = _ARRAY.sub(lambda match: f"[{evaluate(match[1], source.macros, header.constants)}]", body)
    declared = f"{block.kind} {block.name}"
    _declare(header, f"{declared} {{{body}}};", packed=block.packed)
    try:
        c_type = header.ffi.typeof(declared)
        header.structures[block.name] = header.ffi.sizeof(c_type), tuple(_members(header.ffi, c_type, 0))
    except Exception as error:
        raise NotEvaluated(_why(error)) from error


def _declare(header: Header, text: str, *, packed: bool = False) -> None:
    try:
        header.ffi.cdef(text, packed=packed)
    except Exception as error:
        # cffi and pycparser have many, for what they do not understand
        raise NotEvaluated(_why(error)) from error


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _members(ffi: Any, c_type: Any, base: int) -> Iterator[Member]:
    for name, member in c_type.fields or ():
        offset = base + member.offset
        if name:
            flexible = member.type.kind == "array" and member.type.length is None
            yield Member(name, offset, 0 if flexible else ffi.sizeof(member.type), member.type.cname)
        else:
            yield from _members(ffi, member.type, offset)


def _enumerate(header: Header, block: Block, source: Source) -> None:
    following = 0
    for name, text in _ENUMERATOR.findall(block.body):
        following = evaluate(text, source.macros, header.constants) if text else following
        header.constants[name] = following
        following += 1


def _size_of(header: Header, c_type: str) -> int:
    try:
        size: int = header.ffi.sizeof(c_type)
    except Exception as error:  # as above
        raise NotEvaluated(f"the size of {c_type} is not known") from error
    return size
