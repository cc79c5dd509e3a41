"""A kernel interface that reports every request."""

from __future__ import annotations

import time
from collections.abc import Callable

from ...abi.vhost import VHOST_MSG_V2_LAYOUT, VhostIoctl
from ...errors import errno_name
from .system import System

__all__ = ["TracedSystem"]


class TracedSystem:
    """``system`` (borrowed), calling ``say`` with one line for each request."""

    def __init__(self, system: System, say: Callable[[str], None]) -> None:
        self._system = system
        self._say = say

    def open(self, path: str) -> int:
        """As `System.open`."""
        return self._system.open(path)

    def ioctl(self, fd: int, request: int, argument: bytearray | int) -> int:
        """As `System.ioctl`."""
        before = _shown(argument)
        name = _NAMES.get(request, f"ioctl {request:#x}")
        return self._traced(
            f"{name} {before}", lambda: self._system.ioctl(fd, request, argument), lambda: _change(before, argument)
        )

    def write(self, fd: int, data: bytes) -> int:
        """As `System.write`."""
        return self._traced(_message(data), lambda: self._system.write(fd, data), lambda: "")

    def close(self, fd: int) -> None:
        """As `System.close`."""
        self._system.close(fd)

    def _traced(self, what: str, call: Callable[[], int], more: Callable[[], str]) -> int:
        begin_ns = time.time_ns()
        came = ""
        try:
            result = call()
            came = f"{result}{more()}"
            return result
        except OSError as error:
            came = f"failed: {errno_name(error.errno or 0)}"
            raise
        finally:
            took_ns = time.time_ns() - begin_ns
            self._say(f"{begin_ns // 10**9}.{begin_ns % 10**9:09} {what} -> {came} ({took_ns} ns)")


_NAMES = {int(request): request.name for request in VhostIoctl}


def _shown(argument: bytearray | int) -> str:
    return hex(argument) if isinstance(argument, int) else bytes(argument).hex()


def _change(before: str, argument: bytearray | int) -> str:
    """What the kernel has written into the argument."""
    after = _shown(argument)
    return "" if after == before else f" {after}"


def _message(data: bytes) -> str:
    if len(data) != VHOST_MSG_V2_LAYOUT.size_bytes:
        return f"write {data.hex()}"
    facts = VHOST_MSG_V2_LAYOUT.decode(data)
    return " ".join(("IOTLB", *(f"{name}={value:#x}" for name, value in facts.items() if isinstance(value, int))))
