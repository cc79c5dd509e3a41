"""The four system calls that the driver makes. A seam: unit tests put a fake kernel here."""

from __future__ import annotations

import fcntl
import os
from typing import Protocol

__all__ = ["LINUX", "System"]


class System(Protocol):
    """What the driver needs of a kernel. Errors are OSError; InterruptedError where a signal came first."""

    def open(self, path: str) -> int:
        """Open a node for reading and writing, closed on exec; the caller owns the descriptor."""

    def ioctl(self, fd: int, request: int, argument: bytearray | int) -> None:
        """ioctl(2); a buffer is changed in place."""

    def write(self, fd: int, data: bytes) -> int:
        """write(2), one call."""

    def close(self, fd: int) -> None:
        """close(2)."""


class _Linux:
    def open(self, path: str) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: bytearray | int) -> None:
        # a buffer of up to 1024 bytes goes through a stack copy with the GIL released: larger ones would hold it
        fcntl.ioctl(fd, request, argument)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def close(self, fd: int) -> None:
        os.close(fd)


LINUX: System = _Linux()
