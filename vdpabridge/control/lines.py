"""JSON-RPC 2.0, one message a line, with descriptors beside it.

Source: https://www.jsonrpc.org/specification; a message is a JSON object on one line, ended by a newline.
"""

from __future__ import annotations

import array
import contextlib
import json
import select
import socket
from typing import Any

from ..errors import DeadlineExceeded, VdpaBridgeError
from ..linux.deadline import NOW
from ..linux.descriptors import FDS_PER_MESSAGE_MAX, discard, fds_in, hang_up

__all__ = [
    "ANSWER_BYTES_MAX",
    "FDS_MAX",
    "INVALID_PARAMS",
    "INVALID_REQUEST",
    "KINDS",
    "METHOD_NOT_FOUND",
    "PARSE_ERROR",
    "REFUSED",
    "TIMED_OUT",
    "UNABLE",
    "Lines",
]

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602
#: The device or a procedure refused; ``data`` has the parts of the error.
REFUSED = -32000
#: The values of ``kind`` in ``data``.
TIMED_OUT, UNABLE = KINDS = "timed out", "unable"
FDS_MAX = 4
#: Room for answers that the client has not read yet.
ANSWER_BYTES_MAX = 1 << 20
_LINE_BYTES_MAX = 1 << 20


class Lines:
    """Messages over ``connection``; takes ownership of it. Owns received descriptors until `take_fd`.

    A sender sends a message and its descriptors by one sendmsg(2): descriptors belong to the line in which the bytes
    received with them end.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._fds: list[tuple[int, int]] = []
        """(number of bytes received up to and with it, descriptor)."""
        self._came = 0
        self._line_end = 0
        """How many bytes the lines so far had."""

    def fileno(self) -> int:
        """The socket; borrowed."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Send one message; ``fds`` are borrowed. Raises `VdpaBridgeError` if the peer is gone or does not read."""
        data = json.dumps(message).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            if rest := data[sent:]:
                self._socket.sendall(rest)
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            raise VdpaBridgeError("control socket", why=f"send: {error.strerror or error}") from error

    def try_send(self, message: dict[str, Any]) -> None:
        """Send one message if the peer has room for it; otherwise drop it."""
        if NOW.wait({self._socket.fileno(): select.POLLOUT}):
            # the kernel sends so short a message on a UNIX socket whole or not at all
            with contextlib.suppress(OSError):
                self._socket.send(json.dumps(message).encode() + b"\n", socket.MSG_NOSIGNAL)

    def receive(self) -> bytes | None:
        """The next line; None at the end of the stream. Raises `VdpaBridgeError` if it is too long or does not come."""
        while not self.has_line:
            if not self.read():
                return None
        line, self._buffer = self._buffer.split(b"\n", 1)
        self._line_end += len(line) + 1
        return line

    def read(self) -> bool:
        """Wait for data and take it in; False at the end of the stream."""
        # room for as many descriptors as can come: the kernel closes the rest in this thread, however long that lasts
        space = socket.CMSG_SPACE(FDS_PER_MESSAGE_MAX * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            raise VdpaBridgeError("control socket", why=f"receive: {error.strerror or error}") from error
        self._came += len(data)
        self._fds += [(self._came, fd) for fd in fds_in(ancillary)]
        self._buffer += data
        if len(self._fds) > FDS_MAX:
            raise VdpaBridgeError("control socket", why=f"more than {FDS_MAX} descriptors that no request asked for")
        if len(self._buffer) > _LINE_BYTES_MAX and not self.has_line:
            raise VdpaBridgeError("control socket", why=f"a line of more than {_LINE_BYTES_MAX} bytes")
        return bool(data)

    def _late(self) -> DeadlineExceeded:
        hint = "the process that owns the device is stopped, or busy"
        return DeadlineExceeded("control socket", self._socket.gettimeout() or 0, hint=hint)

    @property
    def has_line(self) -> bool:
        """Whether `receive` returns a line at once."""
        return b"\n" in self._buffer

    def take_fd(self) -> int | None:
        """The next descriptor that came with the last line, owned by the caller from now on."""
        if self._fds and self._fds[0][0] <= self._line_end:
            return self._fds.pop(0)[1]
        return None

    def drop_fds(self) -> None:
        """Close the descriptors that came with the last line and were not taken."""
        while (fd := self.take_fd()) is not None:
            discard([fd])

    def end(self) -> None:
        """Shut the connection down both ways; the socket stays open."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and the descriptors that nobody took. Idempotent."""
        discard(fd for _, fd in self._fds)
        self._fds.clear()
        hang_up(self._socket)
