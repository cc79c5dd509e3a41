"""The process at the other end of a socket, as the kernel knows it."""

from __future__ import annotations

import os
import select
import socket
import struct

from ..deadline import Deadline

__all__ = ["hang_up"]

_CREDENTIALS = struct.Struct("3i")


def hang_up(connection: int, timeout_s: float | None) -> bool:
    """Send nothing any more through socket ``connection`` (borrowed), and wait for the end of the peer's process.

    Whether it is certain that the process which listened there has ended, and its end of the socket is closed. False
    also where the process cannot be known: it is this one, or of another PID namespace.

    Source: unix(7), SO_PEERCRED; pidfd_open(2), Linux 5.3.
    """
    deadline = Deadline(timeout_s)
    with socket.socket(fileno=os.dup(connection)) as peer:
        pid, _, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if pid in (0, os.getpid()):
            return False
        peer.shutdown(socket.SHUT_WR)
        # both: a process may have handed its end to another, and to close it does not end a thread that is at work
        return _happens(peer.fileno(), 0, deadline) and _ends(pid, deadline)


def _ends(pid: int, deadline: Deadline) -> bool:
    try:
        # another process can have this number by now only if ours has ended: then this waits for too much
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return _happens(pidfd, select.POLLIN, deadline)
    finally:
        os.close(pidfd)


def _happens(fd: int, events: int, deadline: Deadline) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    left_s = deadline.left_s()
    return bool(poll.poll(None if left_s is None else left_s * 1000))
