"""JSON-RPC 2.0, one message a line, with descriptors beside it.

Source: https://www.jsonrpc.org/specification; a message is a JSON object on one line, ended by a newline.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from typing import Any

from ..errors import VdpaBridgeError

__all__ = ["FDS_MAX", "INVALID_PARAMS", "INVALID_REQUEST", "METHOD_NOT_FOUND", "PARSE_ERROR", "REFUSED", "Lines"]

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602
#: The device or a procedure said no; ``data`` has the parts of the error.
REFUSED = -32000
FDS_MAX = 4
_LINE_BYTES_MAX = 1 << 20


class Lines:
    """Messages over ``connection``, which is taken. Owns the descriptors that came and were not taken."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._fds: list[int] = []

    def fileno(self) -> int:
        """The socket; borrowed."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Send one message; ``fds`` are borrowed. Raises `VdpaBridgeError` where the peer is gone or does not read."""
        data = json.dumps(message).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            self._socket.sendall(data[sent:])
        except OSError as error:
            raise VdpaBridgeError("control socket", why=f"send: {error.strerror or error}") from error

    def offer(self, message: dict[str, Any]) -> None:
        """Send one message if the peer has room for it, and else not."""
        # a message on a UNIX socket that is this short goes whole or not at all
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps(message).encode() + b"\n", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def receive(self) -> bytes | None:
        """The next line, None at the end. Raises `VdpaBridgeError` for one without end, or that does not come."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > _LINE_BYTES_MAX:
                raise VdpaBridgeError("control socket", why=f"a line of more than {_LINE_BYTES_MAX} bytes")
            if not self.read():
                return None
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def read(self) -> bool:
        """Take in what is there, waiting for something; False at the end."""
        space = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise VdpaBridgeError("control socket", why=f"receive: {error.strerror or error}") from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = array.array("i")
                whole.frombytes(content[: len(content) - len(content) % whole.itemsize])
                self._fds += whole
        self._buffer += data
        return bool(data)

    @property
    def has_line(self) -> bool:
        """Whether `receive` returns a line at once."""
        return b"\n" in self._buffer

    def take_fd(self) -> int | None:
        """The next descriptor that came, owned by the caller from now on."""
        return self._fds.pop(0) if self._fds else None

    def close(self) -> None:
        """Close the socket and the descriptors that nobody took. Idempotent."""
        while (fd := self.take_fd()) is not None:
            os.close(fd)
        self._socket.close()
