"""Which process is at the other end of a UNIX socket."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

__all__ = ["Credentials", "credentials_of"]

_UCRED = struct.Struct("3i")


class Credentials(NamedTuple):
    """A process as it was when it connected, or listened. Source: unix(7), SO_PEERCRED."""

    pid: int
    """0 for a process of another PID namespace."""
    uid: int
    gid: int


def credentials_of(connection: socket.socket) -> Credentials:
    """The credentials of the peer of ``connection`` (borrowed)."""
    return Credentials(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
