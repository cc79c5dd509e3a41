"""Requests to an open vhost-vdpa node; this module handles EINTR, deadlines, ownership and readable errors."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from ...abi.vhost import VhostIoctl as Ioctl
from ...errors import DeadlineExceeded, KernelError, OwnershipError
from ...linux.deadline import StillRunning, TimeLimit, call_within
from ...linux.holders import holders
from .call_thread import CallThread
from .explain import explain
from .ioctls import ROWS
from .system import LINUX, System
from .tracing import TracedSystem

__all__ = ["Node", "NodeError"]

Value = TypeVar("Value")


class NodeError(KernelError):
    """A node that cannot be opened, or is not a vhost-vdpa node."""


class Node:
    """An open vhost-vdpa node. Owns its descriptor.

    ``limit`` bounds the system calls. A call that is still in the kernel when its time is over continues there, and its
    result is dropped. Until it ends, other requests raise `DeadlineExceeded` instead of waiting behind it.
    """

    def __init__(self, fd: int, path: str, system: System = LINUX, *, timeout_s: float | None = None) -> None:
        self.path = path
        self.limit = TimeLimit(timeout_s)
        self._fd = fd
        self._system = system
        self._owner_pid = os.getpid()
        self._calls = CallThread("vdpabridge-call")
        self._together: int | None = None
        """The thread whose calls already share one deadline."""
        self._request: Ioctl | int | str = ""
        """The last request."""

    @classmethod
    def open(cls, path: str, system: System = LINUX, *, timeout_s: float | None = None) -> Node:
        """Open the node at ``path``, which resets the device. Raises `NodeError`, `DeadlineExceeded`."""
        if system is LINUX:
            _check_is_vhost_vdpa(path)
        try:
            if timeout_s is None:
                fd = system.open(path)
            else:
                fd = call_within(timeout_s, lambda: system.open(path), discard=system.close)
        except StillRunning:
            hint = "opening it resets it: look at the device's daemon, or the kernel log"
            raise DeadlineExceeded("open", timeout_s or 0, device=path, hint=hint) from None
        except OSError as error:
            raise _node_error(path, error.errno or 0) from None
        return cls(fd, path, system, timeout_s=timeout_s)

    def fileno(self) -> int:
        """The descriptor; borrowed. -1 when closed."""
        return self._fd

    def trace_to(self, say: Callable[[str], None]) -> None:
        """Call ``say`` with one line for every request from now on."""
        self._system = cast(System, TracedSystem(self._system, say))

    def call(self, request: Ioctl | int, argument: bytearray | int = 0, queue: int | None = None) -> int:
        """Make one ioctl, also one of which only the number is known; the kernel changes a buffer in place.

        Returns what the kernel returned. Raises `KernelError`, `OwnershipError`, `DeadlineExceeded`.
        """
        if self._owner_pid != os.getpid() and not _asks_only(request):
            self._refuse_fork(_name(request))
        while True:
            try:
                if not self._is_bounded and not self._calls.busy:
                    return self._system.ioctl(self._fd, request, argument)
                return self._bounded(request, lambda: self._system.ioctl(self._fd, request, argument))
            except DeadlineExceeded:
                raise
            except InterruptedError:
                # Python 3.11's fcntl.ioctl does not retry; a request that a signal interrupted has not begun
                continue
            except OSError as error:
                code = error.errno or 0
                why, hint = explain(request, code)
                raise KernelError(code, _name(request), device=self.path, why=why, hint=hint, queue=queue) from None

    def write(self, message: bytes) -> None:
        """Write one IOTLB message. Raises OSError as the kernel does, `OwnershipError`, `DeadlineExceeded`."""
        if self._owner_pid != os.getpid():
            self._refuse_fork("IOTLB message")
        # a success answers 72, whatever the message's length: there are no short writes here
        self._bounded("IOTLB message", lambda: self._system.write(self._fd, message))

    def together(self, what: str, calls: Callable[[], Value]) -> Value:
        """Run ``calls``, which makes several calls, under one deadline: that needs a thread once, not for each.

        When the deadline has passed, the call under way ends in an error, and ``calls`` with it. Raises as `call` does.
        """
        if self._together == threading.get_ident() or not self._is_bounded:
            return calls()

        def run() -> Value:
            self._together = threading.get_ident()
            try:
                return calls()
            finally:
                if self._together == threading.get_ident():
                    self._together = None

        return self._bounded(what, run)

    def close(self) -> None:
        """Close. The last descriptor's close resets the device. Idempotent. Raises `DeadlineExceeded`."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            if self.stuck:
                self._system.close(fd)  # a request is still in the kernel: its end closes the node
            else:
                self._bounded("close", lambda: self._system.close(fd), must=True)
        finally:
            self._calls.close()

    @property
    def usable(self) -> bool:
        """Whether this process owns the open node and no call of it is stuck in the kernel."""
        return self._fd >= 0 and self._owner_pid == os.getpid() and not self.stuck

    @property
    def stuck(self) -> bool:
        """Whether a call whose deadline has passed is still in the kernel."""
        return self._calls.busy

    def _bounded(self, what: Ioctl | int | str, call: Callable[[], Value], *, must: bool = False) -> Value:
        self._require_unstuck(what)
        if self._together == threading.get_ident():
            self._request = what
            try:
                return call()
            finally:
                # if its deadline has passed, the caller already has an error: nothing more may follow from this answer
                self._require_unstuck(what)
        deadline = self.limit.deadline()
        self._request = what
        while True:
            try:
                left_s = deadline.left_s()
                return call() if left_s is None else self._calls.call(left_s, call, must=must)
            except InterruptedError:
                continue
            except StillRunning:
                raise self._too_late(_name(self._request), deadline.timeout_s or 0) from None

    @property
    def _is_bounded(self) -> bool:
        return self.limit.left_s() is not None

    def _require_unstuck(self, what: Ioctl | int | str) -> None:
        if self.stuck:
            why = f"{_name(self._request)} is still in the kernel"
            raise DeadlineExceeded(_name(what), 0, device=self.path, why=why)

    def _too_late(self, what: str, timeout_s: float) -> DeadlineExceeded:
        if not self.stuck:
            return DeadlineExceeded(what, timeout_s, device=self.path, why="no time was left to ask the kernel")
        hint = "the request continues in the kernel: look at the kernel log and at the device's daemon"
        return DeadlineExceeded(what, timeout_s, device=self.path, hint=hint)

    def _refuse_fork(self, what: str) -> None:
        why = f"the device belongs to process {self._owner_pid}, and this is a fork of it"
        raise OwnershipError(
            what, device=self.path, why=why, hint="open the device after fork, in the process that uses it"
        )


def _name(request: Ioctl | int | str) -> str:
    if isinstance(request, Ioctl):
        return request.name
    return request if isinstance(request, str) else f"ioctl {request:#x}"


def _asks_only(request: Ioctl | int) -> bool:
    return isinstance(request, Ioctl) and request in ROWS and ROWS[request].asks_only


def _check_is_vhost_vdpa(path: str) -> None:
    """Check before opening: opening another device's node can have effects (arm a watchdog, rewind a tape)."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise _node_error(path, error.errno or 0) from None
    if not stat.S_ISCHR(status.st_mode):
        raise _node_error(path, errno.ENOTTY)
    link = f"/sys/dev/char/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if os.path.isdir("/sys/dev/char"):
        if not os.path.islink(link):
            raise _node_error(path, errno.ENXIO)
        if not os.path.basename(os.readlink(link)).startswith("vhost-vdpa-"):
            raise _node_error(path, errno.ENOTTY)


def _node_error(path: str, code: int) -> NodeError:
    why, hint = explain("open", code)
    if code == errno.EBUSY and (who := holders(path)):
        why = "held by " + ", ".join(map(str, who))
    return NodeError(code, "open", device=path, why=why, hint=hint)
