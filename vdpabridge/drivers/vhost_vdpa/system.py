"""The four system calls that the driver makes; unit tests put a fake kernel here."""

from __future__ import annotations

import fcntl
import os
from typing import Protocol, cast

__all__ = ["LINUX", "System"]


class System(Protocol):
    """What the driver needs of a kernel. Errors are OSError; InterruptedError if a signal came first."""

    def open(self, path: str, /) -> int:
        """Open a node for reading and writing, closed on exec; the caller owns the descriptor."""

    def ioctl(self, fd: int, request: int, argument: bytearray | int, /) -> int:
        """ioctl(2); a buffer is changed in place."""

    def write(self, fd: int, data: bytes, /) -> int:
        """write(2), one call."""

    def close(self, fd: int, /) -> None:
        """close(2)."""


class _Linux:
    def open(self, path: str) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    # the functions themselves: a wrapper would cost as much as the system call. ioctl copies a buffer of up to 1024
    # bytes and lets other threads run meanwhile; with a larger one it does not
    ioctl = staticmethod(fcntl.ioctl)
    write = staticmethod(os.write)
    close = staticmethod(os.close)


LINUX = cast(System, _Linux())  # ioctl has an overload for a buffer, and one for a number
