"""``vdpabridge uapi`` and ``vdpabridge ioctl``: read a kernel header, and make the requests that it defines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ..errors import KernelError, UsageError, VdpaBridgeError
from .output import print_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..uapi.header import Header

__all__ = ["ioctl", "uapi"]

#: Numbers from here on are shown in hexadecimal too.
_LARGE = 0xFFFF


def uapi(arguments: argparse.Namespace) -> None:
    """``vdpabridge uapi``: what a header defines, or what is different in another."""
    from ..uapi.header import read_header

    header = read_header(arguments.header)
    if arguments.diff is not None:
        _show_differences(arguments, header, read_header(arguments.diff))
        return
    facts = _facts(header)
    if arguments.json:
        print(json.dumps({"uapi": facts}, indent=4 if arguments.pretty else None))
        return
    rows = [
        (f"{each.number:#010x}", each.direction or "-", each.type_name or "-", str(each.size_bytes), each.name)
        for each in header.requests.values()
    ]
    print_table(("NUMBER", "DIRECTION", "ARGUMENT", "BYTES", "NAME"), rows)
    for first, second in header.collisions:
        print(f"collision: {first} and {second} have the same number")
    for name, (size_bytes, members) in header.structures.items():
        shown = ", ".join(f"{each.offset} {each.c_type} {each.name}" for each in members)
        print(f"{name}: {size_bytes} bytes: {shown}")
    for name, why in header.unknown.items():
        print(f"not evaluated: {name}: {why}")


def _facts(header: Header) -> dict[str, Any]:
    return {
        "requests": {
            each.name: {
                "number": each.number,
                "direction": each.direction,
                "argument": each.type_name,
                "size_bytes": each.size_bytes,
            }
            for each in header.requests.values()
        },
        "structures": {
            name: {
                "size_bytes": size_bytes,
                "members": {
                    each.name: {"offset": each.offset, "size_bytes": each.size_bytes, "type": each.c_type}
                    for each in members
                },
            }
            for name, (size_bytes, members) in header.structures.items()
        },
        "constants": header.constants,
        "collisions": [list(pair) for pair in header.collisions],
        "not_evaluated": header.unknown,
    }


def _show_differences(arguments: argparse.Namespace, before: Header, after: Header) -> None:
    from ..uapi.difference import differences

    changes = differences(before, after)
    if arguments.json:
        facts = [{"kind": each.kind, "name": each.name, "before": each.before, "after": each.after} for each in changes]
        print(json.dumps({"differences": facts}, indent=4 if arguments.pretty else None))
        return
    for each in changes:
        if not each.before:
            print(f"+ {each.kind} {each.name}: {each.after}")
        elif not each.after:
            print(f"- {each.kind} {each.name}: {each.before}")
        else:
            print(f"! {each.kind} {each.name}: {each.before} -> {each.after}")


def ioctl(arguments: argparse.Namespace) -> None:
    """``vdpabridge ioctl``: open a node, and make requests by name, one after the other, until one fails."""
    from ..drivers.vhost_vdpa.node import Node
    from ..uapi.arguments import call_of
    from ..uapi.header import read_header

    header = None if arguments.uapi is None else read_header(arguments.uapi)
    # all of them are looked up before the node is opened: that resets the device
    calls = [(call_of(name, header), values) for name, values in _requests(arguments.requests)]
    ready = [(call, call.argument(values)) for call, values in calls]
    done: list[dict[str, Any]] = []
    node = Node.open(_node_of(arguments.device), timeout_s=arguments.timeout)
    try:
        for call, argument in ready:
            try:
                returned = node.call(call.number, argument)
            except KernelError as error:
                error.what = call.name
                raise
            done.append({"request": call.name, "returned": returned, "argument": call.facts(argument)})
            if not arguments.json:
                print(_line(done[-1]))
    finally:
        node.close()
        if arguments.json:
            print(json.dumps({"ioctl": done}, indent=4 if arguments.pretty else None))


def _requests(words: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """A word without "=" begins a request; those with it are its argument's members."""
    name, values = "", dict[str, str]()
    for word in words:
        member, equals, value = word.partition("=")
        if equals:
            if not name:
                raise UsageError("ioctl", why=f"{word} comes before any request")
            values[member] = value
        else:
            if name:
                yield name, values
            name, values = word, {}
    yield name, values


def _node_of(device: str) -> str:
    if "/" in device:
        return device
    from ..bus.bus import Bus

    name = device.removeprefix("vdpa:")
    node = Bus().device(name).node
    if node is None:
        why, hint = "it has no node", f"'vdpabridge bind {name} vhost_vdpa' gives it one"
        raise VdpaBridgeError("ioctl", device=name, why=why, hint=hint)
    return node


def _line(done: dict[str, Any]) -> str:
    shown = " ".join(f"{name}={_shown(value)}" for name, value in done["argument"].items())
    return f"{done['request']}: {done['returned']}{' ' if shown else ''}{shown}"


def _shown(value: int | str) -> str:
    return f"{value:#x}" if isinstance(value, int) and value > _LARGE else str(value)
