"""Hot-plug events of the vDPA bus, straight from the kernel.

The netlink family has no multicast group and the char device sends no event. The kernel sends uevents of subsystem
``vdpa``: add, bind, unbind, remove (and change, if a process asks for one).
"""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass
from typing import Self

from ..linux.deadline import Deadline

__all__ = ["BusEvent", "BusEvents", "parse_uevent"]

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_LARGEST_BYTES = 16384
_RECEIVE_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BusEvent:
    """Something happened to device ``name``."""

    action: str
    """``add``, ``bind``, ``unbind``, ``remove``."""
    name: str
    driver: str | None
    """The driver that the event is about, if it names one."""


class BusEvents:
    """A subscription to the bus's events, from the moment it is made. Needs no privilege. One thread at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        self._socket.bind((0, _KERNEL_GROUP))

    def fileno(self) -> int:
        """The socket, readable when an event may be waiting; borrowed."""
        return self._socket.fileno()

    def next(self, timeout_s: float | None = None) -> BusEvent | None:
        """The next event; None if none came in time. Raises OSError (ENOBUFS) if events were lost."""
        deadline = Deadline(timeout_s)
        while deadline.wait({self._socket.fileno(): select.POLLIN}):
            message, (sender_pid, _groups) = self._socket.recvfrom(_LARGEST_BYTES)
            # other processes can send to the group as well; the kernel's number is 0
            if sender_pid == 0 and (event := parse_uevent(message)):
                return event
        return None

    def close(self) -> None:
        """End the subscription. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_uevent(message: bytes) -> BusEvent | None:
    """The event in a uevent message; None if it is not of the vDPA bus. Source: lib/kobject_uevent.c."""
    _head, *pairs = message.decode(errors="replace").split("\0")
    values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if values.get("SUBSYSTEM") != "vdpa":
        return None
    return BusEvent(values.get("ACTION", ""), os.path.basename(values.get("DEVPATH", "")), values.get("DRIVER"))
