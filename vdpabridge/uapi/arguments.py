"""The argument of a request, by the names of its members: from a header, or from the tables of `abi.vhost`."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ..abi import vhost
from ..abi.layout import Layout
from ..abi.vhost import VhostIoctl
from ..errors import UsageError
from .header import Header, Member

__all__ = ["Call", "call_of"]

#: The one member of an argument that is no structure.
VALUE = "value"
_SIGNED = ("int", "int8_t", "int16_t", "int32_t", "int64_t", "long", "short")


@dataclass(frozen=True, slots=True)
class Call:
    """A request that can be made: its number, and what its argument is made of."""

    name: str
    number: int
    size_bytes: int
    members: tuple[Member, ...]

    def argument(self, values: Mapping[str, str]) -> bytearray | int:
        """The argument with ``values``, and 0 elsewhere. Raises `UsageError` for what does not fit."""
        if not self.size_bytes:
            if values.keys() - {VALUE}:
                raise UsageError(self.name, why="it has no argument", hint=f"{VALUE}=N gives it a number")
            return _number(self.name, VALUE, values.get(VALUE, "0"))
        buffer = bytearray(self.size_bytes)
        for name, text in values.items():
            member = next((each for each in self.members if each.name == name), None)
            if member is None:
                known = ", ".join(each.name for each in self.members)
                raise UsageError(self.name, why=f"its argument has no {name}", hint=f"it has {known}")
            buffer[member.offset : member.offset + member.size_bytes] = _packed(self.name, member, text)
        return buffer

    def facts(self, argument: bytearray | int) -> dict[str, int | str]:
        """What is in the argument, by its members."""
        if isinstance(argument, int):
            return {}
        return {each.name: _unpacked(each, argument) for each in self.members if each.size_bytes}


def call_of(name: str, header: Header | None) -> Call:
    """The request ``name`` of ``header``, or of the kernel as it is known here; or by ``NUMBER``, or ``NUMBER:SIZE``.

    Raises `UsageError` if there is none.
    """
    if header is not None and name in header.requests:
        request = header.requests[name]
        return Call(name, request.number, request.size_bytes, _members(header, request.type_name))
    if name in VhostIoctl.__members__:
        known = VhostIoctl[name]
        size_bytes = 0 if known.carries is None else known.carries.size
        return Call(name, int(known), size_bytes, _known_members(known.carries))
    number, colon, size = name.partition(":")
    try:
        value = int(number, 0)
        size_bytes = int(size, 0) if colon else value >> 16 & 0x3FFF
    except ValueError:
        where = f"neither in {header.path} nor here" if header is not None else "not here"
        raise UsageError(
            "ioctl", why=f"{name} is {where}", hint="--uapi HEADER reads a header, or give its number"
        ) from None
    return Call(name, value, size_bytes, (Member("bytes", 0, size_bytes, "bytes"),) if size_bytes else ())


def _members(header: Header, type_name: str) -> tuple[Member, ...]:
    words = type_name.split()
    if not words:
        return ()
    if words[0] in ("struct", "union") and words[-1] in header.structures:
        return header.structures[words[-1]][1]
    c_type = header.ffi.typeof(type_name)
    return (Member(VALUE, 0, header.ffi.sizeof(c_type), c_type.cname),)


def _known_members(carries: struct.Struct | None) -> tuple[Member, ...]:
    if carries is None:
        return ()
    layouts = [each for each in vars(vhost).values() if isinstance(each, Layout) and each.struct is carries]
    if not layouts:
        return (Member(VALUE, 0, carries.size, "int" if carries.format.endswith("i") else "unsigned int"),)
    layout = layouts[0]
    ends = [*list(layout.offsets.values())[1:], layout.size_bytes]
    return tuple(
        Member(name, at, end - at, "int" if name == "fd" else "unsigned int")
        for (name, at), end in zip(layout.offsets.items(), ends, strict=True)
    )


def _number(request: str, name: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise UsageError(request, why=f"{name}={text} is not a number", hint="as 5 or 0x5") from None


def _packed(request: str, member: Member, text: str) -> bytes:
    if member.c_type == "bytes" or member.c_type.startswith("char["):
        data = bytes.fromhex(text) if member.c_type == "bytes" else text.encode()
        if len(data) > member.size_bytes:
            why = f"{member.name} has {member.size_bytes} bytes, and {len(data)} were given"
            raise UsageError(request, why=why)
        return data.ljust(member.size_bytes, b"\0")
    value = _number(request, member.name, text)
    try:
        return value.to_bytes(member.size_bytes, sys.byteorder, signed=value < 0)
    except OverflowError:
        raise UsageError(request, why=f"{member.name}={text} does not fit into {member.size_bytes} bytes") from None


def _unpacked(member: Member, argument: bytearray) -> int | str:
    data = bytes(argument[member.offset : member.offset + member.size_bytes])
    if member.c_type == "bytes" or "[" in member.c_type or member.c_type.startswith(("struct", "union", "<")):
        return data.rstrip(b"\0").decode(errors="replace") if member.c_type.startswith("char") else data.hex()
    return int.from_bytes(data, sys.byteorder, signed=member.c_type in _SIGNED)
