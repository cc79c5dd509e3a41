"""Printing: JSON in iproute2's shape, or text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

__all__ = ["forget_output", "print_json", "print_records", "print_table"]

Record = Mapping[str, object]


def forget_output() -> None:
    """What could not be written: without this Python tries again at its exit, and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def print_json(section: str, records: Mapping[str, Record], *, pretty: bool) -> None:
    """``{"section": {"name": {…}}}``, with a null for what is not known left out."""
    import json

    known = {
        name: {key: value for key, value in record.items() if value is not None} for name, record in records.items()
    }
    print(json.dumps({section: known}, indent=4 if pretty else None, separators=None if pretty else (",", ":")))


def print_records(records: Mapping[str, Record]) -> None:
    """One line a record: ``name: key value key value``; a list is joined by spaces."""
    for name, record in records.items():
        words = [f"{key} {_text(value)}" for key, value in record.items() if value not in (None, [], "")]
        print(f"{name}: {' '.join(words)}")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
