"""Descriptors that came from somebody else: what they are, and closing them without waiting.

close(2) can wait for as long as the peer likes: a TCP socket that lingers, a file of a server that does not answer, a
UNIX socket in whose queue such a descriptor lies. Passing one would be enough to stop a process.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
from collections import deque
from collections.abc import Iterable
from enum import Enum

__all__ = ["FDS_PER_MESSAGE_MAX", "Kind", "discard", "kind_of", "same_socket"]

#: SCM_MAX_FD: the kernel takes no more in one message. With less room than that it closes the rest, in our thread.
FDS_PER_MESSAGE_MAX = 253


class Kind(Enum):
    """What a descriptor is, as far as it matters here."""

    EVENTFD = "an eventfd"
    FILE = "a file"
    PIPE = "a pipe"
    UNIX_SOCKET = "a UNIX socket"
    DEVICE = "a character device"
    OTHER = "something else"


def kind_of(fd: int) -> Kind:
    """What ``fd`` (borrowed) is. Raises OSError for what is no descriptor."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        # the name of a thing only, of which nothing can be done
        return Kind.OTHER
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return Kind.FILE
    if stat.S_ISFIFO(mode):
        return Kind.PIPE
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            return Kind.UNIX_SOCKET if duplicate.family == socket.AF_UNIX else Kind.OTHER
    if stat.S_ISCHR(mode):
        return Kind.DEVICE
    # a directory, for instance, has not this name
    return Kind.EVENTFD if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]" else Kind.OTHER


def same_socket(fd: int, other: int) -> bool:
    """Whether both (borrowed) are descriptors of one socket."""
    mine, theirs = os.fstat(fd), os.fstat(other)
    return (mine.st_dev, mine.st_ino) == (theirs.st_dev, theirs.st_ino)


def discard(fds: Iterable[int]) -> None:
    """Close ``fds``, which are taken. Raises nothing and waits for nothing: what may last is left to a thread."""
    for fd in fds:
        if _closes_at_once(fd):
            os.close(fd)
        else:
            _CLOSERS.close(fd)


def _closes_at_once(fd: int) -> bool:
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            return True
        # a memfd, or an eventfd: the kernel's own, without anybody behind them
        return not stat.S_ISSOCK(mode) and os.readlink(f"/proc/self/fd/{fd}").startswith(
            ("/memfd:", "anon_inode:[eventfd]")
        )
    except OSError:
        # out of descriptors or not a descriptor: the thread finds out
        return False


class _Closers:
    """Threads that close, as many as there is to be closed at a time, up to a limit; they end when all is done."""

    _THREADS_MAX = 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._threads = 0

    def close(self, fd: int) -> None:
        with self._lock:
            self._waiting.append(fd)
            if self._threads >= self._THREADS_MAX:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._work, name="vdpabridge-close", daemon=True).start()
        except RuntimeError:
            # no thread is to be had: whoever comes next has it done
            with self._lock:
                self._threads -= 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                fd = self._waiting.popleft()
            try:
                os.close(fd)
            except OSError:
                # it is gone whatever close(2) says: EIO of a file server, for instance
                continue


_CLOSERS = _Closers()
