"""A C structure as a table: names, formats and offsets, with a compiled `struct.Struct` to pack it."""

from __future__ import annotations

import struct
from typing import Any

__all__ = ["Layout"]


class Layout:
    """The layout of one C structure.

    ``fields`` are (C member, `struct` format) pairs in order; padding is spelled out as a pair whose member is empty.
    ``byte_order`` is the first character of the format: ``"="`` native, ``"<"`` little-endian (virtio 1.x).
    """

    __slots__ = ("c_name", "fields", "offsets", "size_bytes", "struct")

    def __init__(self, c_name: str, byte_order: str, fields: tuple[tuple[str, str], ...]) -> None:
        self.c_name = c_name
        self.fields = tuple(name for name, _ in fields if name)
        self.struct = struct.Struct(byte_order + "".join(code for _, code in fields))
        self.size_bytes = self.struct.size
        self.offsets: dict[str, int] = {}
        offset = 0
        for name, code in fields:
            if name:
                self.offsets[name] = offset
            offset += struct.calcsize(byte_order + code)

    def pack(self, *values: Any) -> bytes:
        """The structure's bytes from its members' values, in order."""
        return self.struct.pack(*values)

    def buffer(self, *values: Any) -> bytearray:
        """Like `pack`, as a buffer that an ioctl can write into."""
        return bytearray(self.struct.pack(*values))

    def unpack(self, data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[Any, ...]:
        """The members' values, in order, from ``data`` at ``offset``."""
        return self.struct.unpack_from(data, offset)

    def decode(self, data: bytes | bytearray | memoryview) -> dict[str, Any]:
        """Member -> value, for the members that ``data`` holds whole: a device may have an older, shorter structure."""
        whole = bytes(data[: self.size_bytes]).ljust(self.size_bytes, b"\0")
        values = dict(zip(self.fields, self.struct.unpack(whole), strict=True))
        ends = [*list(self.offsets.values())[1:], self.size_bytes]
        return {name: values[name] for name, end in zip(self.fields, ends, strict=True) if end <= len(data)}

    def __repr__(self) -> str:
        return f"<struct {self.c_name}: {self.size_bytes} bytes>"
