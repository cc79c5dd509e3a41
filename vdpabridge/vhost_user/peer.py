"""The process at the other end of a socket, as the kernel knows it."""

from __future__ import annotations

import os
import select
import socket

from ..linux.credentials import credentials_of
from ..linux.deadline import NOW, Deadline

__all__ = ["PeerProcess"]


class PeerProcess:
    """The process that listened at the other end of socket ``connection`` (borrowed). Owns a descriptor of the process.

    The process is not known if it had ended before (and handed its socket to another), if it is this process, or if it
    is in another PID namespace. Source: unix(7), SO_PEERCRED; pidfd_open(2), Linux 5.3.
    """

    def __init__(self, connection: int) -> None:
        self._connection = connection
        self._pidfd = _pidfd_of(connection)

    def hang_up(self, timeout_s: float | None) -> bool:
        """Stop sending, and wait until the process has ended and no process has its end of the socket any more.

        Returns whether both are certain.
        """
        if self._pidfd < 0:
            return False
        deadline = Deadline(timeout_s)
        with socket.socket(fileno=os.dup(self._connection)) as connection:
            connection.shutdown(socket.SHUT_WR)
            # both: a process that has closed its socket may still have a thread at work
            return bool(deadline.wait({connection.fileno(): 0}) and deadline.wait({self._pidfd: select.POLLIN}))

    def has_ended(self, timeout_s: float | None) -> bool:
        """Whether it is certain that the process has ended, and that no process has its end of the socket any more.

        If the socket is closed, waits up to ``timeout_s`` for the end of the process: the socket closes first.
        """
        if self._pidfd < 0 or not NOW.wait({self._connection: 0}):
            return False
        return bool(Deadline(timeout_s).wait({self._pidfd: select.POLLIN}))

    def close(self) -> None:
        """Close. Idempotent."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _pidfd_of(connection: int) -> int:
    with socket.socket(fileno=os.dup(connection)) as peer:
        pid = credentials_of(peer).pid
    if pid in (0, os.getpid()):
        return -1
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return -1
    if NOW.wait({pidfd: select.POLLIN}):
        # it has ended, but another process answers
        os.close(pidfd)
        return -1
    return pidfd
