"""The words of a ring are little-endian, and read and written as whole words, on machines of either order."""

from __future__ import annotations

import sys

__all__ = ["le16", "le32"]


def _same(value: int) -> int:
    return value


def _swap16(value: int) -> int:
    return value >> 8 | (value & 0xFF) << 8


def _swap32(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little"), "big")


le16, le32 = (_same, _same) if sys.byteorder == "little" else (_swap16, _swap32)
