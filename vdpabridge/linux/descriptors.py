"""Descriptors that came from another process: what they are, and how to close them without waiting.

close(2) can wait for as long as the peer likes: for a TCP socket that lingers, a file of a server that does not answer,
a UNIX socket with one of these in its queue. So can fstat(2). By passing one of these, a peer could stop a process.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import stat
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum

from .deadline import StillRunning, call_within

__all__ = ["FDS_PER_MESSAGE_MAX", "Kind", "discard", "fds_in", "hang_up", "kind_of", "same_socket", "stop_receiving"]

#: SCM_MAX_FD: the kernel takes no more in one message. With less room than that, the kernel closes the rest, in the
#: receiving thread.
FDS_PER_MESSAGE_MAX = 253
_INT_BYTES = array.array("i").itemsize
#: File systems that another process or machine serves, which may not answer. FUSE file systems can also have types of
#: their own, which begin with "fuse".
_SERVED = ("fuse", "nfs", "cifs", "smb3", "9p", "ceph", "afs", "virtiofs", "coda", "orangefs", "autofs")
#: How long to wait for fstat(2) of a file whose server is not known.
_ASK_S = 1.0
#: How many of these calls may be unanswered. Each has a thread.
_UNANSWERED_MAX = 4
_UNANSWERED: list[int] = []
#: The most messages that are taken from a queue; a datagram socket's queue has ten (net.unix.max_dgram_qlen).
_MESSAGES_MAX = 4096


class Kind(Enum):
    """What a descriptor is, as far as it matters here."""

    EVENTFD = "an eventfd"
    FILE = "a file"
    SERVED_FILE = "a file that another process or machine may serve"
    PIPE = "a pipe"
    UNIX_SOCKET = "a UNIX socket"
    DEVICE = "a character device"
    OTHER = "something else"


def kind_of(fd: int) -> Kind:
    """What ``fd`` (borrowed) is; known file servers are not asked. Raises OSError if it is not a descriptor."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        # it only names a file; nothing can be done with it
        return Kind.OTHER
    name = os.readlink(f"/proc/self/fd/{fd}")
    if name.startswith("socket:["):
        return Kind.UNIX_SOCKET if _family(fd) == socket.AF_UNIX else Kind.OTHER
    if name.startswith("pipe:["):
        return Kind.PIPE
    if name.startswith("anon_inode:"):
        return Kind.EVENTFD if name == "anon_inode:[eventfd]" else Kind.OTHER
    if _is_memory(fd):
        return Kind.FILE
    return _kind_of_file(fd)


def _kind_of_file(fd: int) -> Kind:
    type_name = _file_system(fd)
    if type_name.startswith(_SERVED):
        return Kind.SERVED_FILE
    status = os.fstat(fd) if type_name else _asked(fd)
    if status is None:
        return Kind.SERVED_FILE
    if stat.S_ISREG(status.st_mode):
        return Kind.FILE if type_name or _is_local(status.st_dev) else Kind.SERVED_FILE
    if stat.S_ISFIFO(status.st_mode):
        return Kind.PIPE
    return Kind.DEVICE if stat.S_ISCHR(status.st_mode) else Kind.OTHER


def _asked(fd: int) -> os.stat_result | None:
    """fstat(2) of a file whose server is not known; None if the answer does not come soon."""
    if len(_UNANSWERED) >= _UNANSWERED_MAX:
        return None

    def ask() -> os.stat_result:
        _UNANSWERED.append(fd)
        try:
            return os.fstat(fd)
        finally:
            _UNANSWERED.remove(fd)

    try:
        return call_within(_ASK_S, ask)
    except (StillRunning, RuntimeError):
        # too late, or no thread could be started
        return None


def _is_local(device: int) -> bool:
    """Whether files on ``device`` are on a disk, or on a file system that is mounted for this process too."""
    if os.major(device):
        return True
    wanted = f"{os.major(device)}:{os.minor(device)}"
    types = [type_name for _, where, type_name in _mounts() if where == wanted]
    return any(not type_name.startswith(_SERVED) for type_name in types)


def _mounts() -> Iterator[tuple[str, str, str]]:
    """(number, device, type of file system) of all mounts of this process. Source: proc_pid_mountinfo(5)."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields = line.split()
            yield fields[0], fields[2], fields[fields.index("-") + 1]


def _is_memory(fd: int) -> bool:
    """Whether ``fd`` is shared memory (memfd, tmpfs, hugetlbfs): nothing else has seals."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _file_system(fd: int) -> str:
    """The type of the file system that ``fd`` is on; "" if that is not mounted for this process."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        wanted = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
    return next((type_name for number, _, type_name in _mounts() if number == wanted), "")


def _family(fd: int) -> int:
    borrowed = socket.socket(fileno=fd)
    try:
        return borrowed.family
    finally:
        borrowed.detach()


def same_socket(fd: int, other: int) -> bool:
    """Whether both (borrowed) are descriptors of one socket."""
    mine, theirs = os.fstat(fd), os.fstat(other)
    return (mine.st_dev, mine.st_ino) == (theirs.st_dev, theirs.st_ino)


def fds_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what recvmsg(2) gave beside the data; the caller owns them."""
    found = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) - len(content) % _INT_BYTES])
    return found.tolist()


def stop_receiving(fd: int) -> None:
    """Receive nothing more through UNIX socket ``fd`` (borrowed), and throw away what has arrived.

    If it is an end of a connection, the other end cannot send any more, and notices that.
    """
    borrowed = socket.socket(fileno=fd)
    try:
        # ENOTCONN: nobody is at the other end
        with contextlib.suppress(OSError):
            borrowed.shutdown(socket.SHUT_RD)
        room = socket.CMSG_SPACE(FDS_PER_MESSAGE_MAX * _INT_BYTES)
        with contextlib.suppress(OSError):
            for _ in range(_MESSAGES_MAX):
                data, ancillary, _, _ = borrowed.recvmsg(1 << 16, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                discard(fds_in(ancillary))
                if not data and borrowed.type == socket.SOCK_STREAM:
                    return
        with contextlib.suppress(OSError):
            # of a listening socket, the connections that wait
            for _ in range(_MESSAGES_MAX):
                discard([borrowed.accept()[0].detach()])
    finally:
        borrowed.detach()


def hang_up(connection: socket.socket) -> None:
    """Close UNIX socket ``connection``, taking ownership, without waiting for what may be in its queue. Idempotent."""
    if connection.fileno() >= 0:
        stop_receiving(connection.fileno())
        connection.close()


def discard(fds: Iterable[int]) -> None:
    """Close ``fds``, taking ownership. Raises nothing and waits for nothing: a thread closes what may take long."""
    for fd in fds:
        if _closes_at_once(fd):
            os.close(fd)
        else:
            _CLOSERS.close(fd)


def _closes_at_once(fd: int) -> bool:
    """Whether the kernel closes ``fd`` without asking another process or machine."""
    try:
        name = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        # not a descriptor: the thread finds out
        return False
    return name == "anon_inode:[eventfd]" or name.startswith("pipe:[") or _is_memory(fd)


def _make_short(fd: int) -> None:
    """Remove from ``fd`` (borrowed) what would make close(2) take long, as far as possible."""
    try:
        family = _family(fd)
    except OSError:
        return
    if family == socket.AF_UNIX:
        stop_receiving(fd)
        return
    borrowed = socket.socket(fileno=fd)
    try:
        # not every kind of socket lingers
        with contextlib.suppress(OSError):
            borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    finally:
        borrowed.detach()


class _Closers:
    """Threads that close descriptors, one for each that waits, up to a limit; they end when all are closed."""

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
            # no thread could be started: the next call gets it closed
            with self._lock:
                self._threads -= 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                fd = self._waiting.popleft()
            # the descriptor is gone whatever close(2) answers, for example EIO from a file server
            with contextlib.suppress(OSError):
                _make_short(fd)
                os.close(fd)


_CLOSERS = _Closers()
