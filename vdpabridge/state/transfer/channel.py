"""Moves bytes between descriptors, by the kernel alone if it can, with a limit, a deadline and a way to cancel."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import DeadlineExceeded, VdpaBridgeError
from ...linux.deadline import NOW, Deadline

__all__ = [
    "READ_AND_WRITE",
    "STEP_BYTES",
    "Cancelled",
    "ChannelError",
    "Copied",
    "Limits",
    "copy",
    "enlarge",
    "read_some",
    "wait",
    "write_all",
]

READ_AND_WRITE = "read and write"

#: The largest pipe that an unprivileged process may make; the default is 64 KiB.
PIPE_BYTES = 1 << 20
#: How much is moved at a time.
STEP_BYTES = 1 << 20
#: No RWF_NOWAIT for this descriptor: pipes have it from Linux 6.4 on, FIFOs with a name do not.
_NO_NOWAIT = (errno.EOPNOTSUPP, errno.ESPIPE, errno.EINVAL)
#: The kernel cannot do it for this pair of descriptors: try the next method.
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EBADF)


class ChannelError(VdpaBridgeError):
    """A transfer that failed: too many bytes came, or one of the two ends failed."""


class Cancelled(ChannelError):
    """The transfer was cancelled."""


@dataclass(slots=True)
class Limits:
    """What bounds a transfer. ``cancel_fd`` (borrowed) becomes readable when the transfer is to end."""

    deadline: Deadline
    size_bytes: int | None = None
    """The most bytes that may come; None for any number."""
    cancel_fd: int | None = None
    progress: Callable[[int], None] | None = None
    """Called with the number of bytes so far."""

    def check_cancelled(self) -> None:
        """Raise `Cancelled` if it is to end: for who has nothing to wait for."""
        if self.cancel_fd is not None and NOW.wait({self.cancel_fd: select.POLLIN}):
            raise Cancelled("transfer", why="it was cancelled")

    def check(self, done: int) -> None:
        """Note that ``done`` bytes have come. Raises `ChannelError` for too many."""
        if self.size_bytes is not None and done > self.size_bytes:
            raise ChannelError("transfer", why=f"more than {self.size_bytes} bytes came", hint="allow for more")
        if self.progress:
            self.progress(done)


def enlarge(fd: int) -> None:
    """Make pipe ``fd`` (borrowed) as large as an unprivileged process may; does nothing if it is not a pipe."""
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode) and fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < PIPE_BYTES:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except PermissionError:
        # this user's pipes together have reached their limit: the transfer is slower, but works
        return


def read_some(fd: int, buffer: memoryview, limits: Limits) -> int:
    """Read into ``buffer`` what ``fd`` (borrowed) has; 0 at its end. Raises as `copy` does."""
    while True:
        wait(fd, select.POLLIN, limits)
        try:
            return os.readv(fd, [buffer])
        except BlockingIOError:
            continue
        except OSError as error:
            raise ChannelError("read", why=os.strerror(error.errno or 0)) from error


def write_all(fd: int, data: bytes | memoryview, limits: Limits) -> None:
    """Write all of ``data`` to ``fd`` (borrowed). Raises as `copy` does."""
    rest = memoryview(data)
    write = os.write if _never_blocks(fd) else _write_what_fits
    while rest:
        wait(fd, select.POLLOUT, limits)
        try:
            rest = rest[write(fd, rest) :]
        except BlockingIOError:
            continue
        except OSError as error:
            raise ChannelError("write", why=os.strerror(error.errno or 0)) from error


class Copied(NamedTuple):
    """The result of `copy`."""

    size_bytes: int
    copied_by: str
    """The system call that moved the bytes; `READ_AND_WRITE` if they went through this process."""


def copy(source: int, sink: int, limits: Limits) -> Copied:
    """Copy ``source`` to its end into ``sink`` (both borrowed).

    The bytes do not pass through this process, unless the kernel has no way between these two kinds of descriptor.
    Raises `ChannelError`, `DeadlineExceeded`, `Cancelled`.
    """
    methods = _methods(source, sink)
    done = 0
    while True:
        wait(source, select.POLLIN, limits)
        wait(sink, select.POLLOUT, limits)
        try:
            count = methods[0](source, sink) if methods else _by_buffer(source, sink, limits)
        except BlockingIOError:
            continue
        except DeadlineExceeded:  # a subclass of OSError, but not an error of the descriptors
            raise
        except OSError as error:
            if error.errno not in _UNABLE or not methods:
                raise ChannelError("transfer", why=os.strerror(error.errno or 0)) from error
            methods.pop(0)
            continue
        if not count:
            return Copied(done, methods[0].__name__.strip("_") if methods else READ_AND_WRITE)
        done += count
        limits.check(done)


Way = Callable[[int, int], int]


def _methods(source: int, sink: int) -> list[Way]:
    """The methods by which the kernel may copy alone, best first."""
    kinds = [os.fstat(fd).st_mode for fd in (source, sink)]
    if stat.S_ISSOCK(kinds[1]) and os.get_blocking(sink):
        # the kernel would wait for room, and does not know the deadline
        return []
    if any(stat.S_ISFIFO(kind) for kind in kinds):
        return [_splice]
    if all(stat.S_ISREG(kind) for kind in kinds):
        return [_copy_file_range, _sendfile]
    return [_sendfile] if stat.S_ISREG(kinds[0]) else []


def _splice(source: int, sink: int) -> int:
    return os.splice(source, sink, STEP_BYTES, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)


def _copy_file_range(source: int, sink: int) -> int:
    return os.copy_file_range(source, sink, STEP_BYTES)


def _sendfile(source: int, sink: int) -> int:
    position = os.lseek(source, 0, os.SEEK_CUR)
    count = os.sendfile(sink, source, position, STEP_BYTES)
    os.lseek(source, position + count, os.SEEK_SET)
    return count


def _by_buffer(source: int, sink: int, limits: Limits) -> int:
    buffer = memoryview(bytearray(STEP_BYTES))
    count = read_some(source, buffer, limits)
    write_all(sink, buffer[:count], limits)
    return count


def _write_what_fits(fd: int, data: memoryview) -> int:
    """Write as much as ``fd`` takes at once; a plain write would block for the rest."""
    try:
        return os.pwritev(fd, [data], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in _NO_NOWAIT:
            raise
    # this many bytes are written at once or not at all: see pipe(7)
    return os.write(fd, data[: select.PIPE_BUF])


def _never_blocks(fd: int) -> bool:
    return not os.get_blocking(fd) or stat.S_ISREG(os.fstat(fd).st_mode)


def wait(fd: int, events: int, limits: Limits) -> None:
    """Wait until ``fd`` (borrowed) is ready, as regular files always are. Raises `DeadlineExceeded`, `Cancelled`."""
    cancelling = {} if limits.cancel_fd is None else {limits.cancel_fd: select.POLLIN}
    ready = limits.deadline.wait({fd: events} | cancelling)
    if limits.cancel_fd in ready:
        raise Cancelled("transfer", why="it was cancelled")
    # the deadline also counts if the descriptor is always ready
    if not ready or limits.deadline.passed:
        why = f"not done within {limits.deadline.timeout_s:g} s"
        raise DeadlineExceeded("transfer", limits.deadline.timeout_s or 0, why=why, hint="the device is stuck or slow")
