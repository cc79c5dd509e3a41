"""One end of a vhost-user socket: whole messages in and out, descriptors with them, a deadline on everything.

Source: docs/interop/vhost-user.rst, "Message Specification" and "Communication": descriptors go with the first byte of
the header. Those that come with any other byte are closed.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Self

from ..abi.vhost_user import FLAG_NEED_REPLY, FLAG_REPLY, HEADER, PAYLOAD_SIZE_MAX, VERSION, VERSION_MASK
from ..errors import ConnectionLost, DeadlineExceeded, ProtocolError
from ..linux.credentials import credentials_of
from ..linux.deadline import Deadline
from ..linux.descriptors import FDS_PER_MESSAGE_MAX, discard, fds_in, hang_up

__all__ = ["FDS_MAX", "Connection", "Message", "is_listening"]

#: The most descriptors in one message: rust-vmm's limit; QEMU sends 8 at the most.
FDS_MAX = 32
_FD_BYTES = array.array("i").itemsize
#: As a plain int: arithmetic with an enumeration takes longer than the system call.
_CTRUNC = int(socket.MSG_CTRUNC)
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_PER_MESSAGE_MAX * _FD_BYTES)
_KNOWN_FLAGS = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY
#: A socket's file appears a moment before its process listens on it.
_RETRY = (errno.ECONNREFUSED, errno.ENOENT)
_RETRY_S = 0.01


class Message:
    """A message as it came. Owns its descriptors until `take_fds` or `close`."""

    __slots__ = ("_fds", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self._fds = fds

    @property
    def fd_count(self) -> int:
        """The number of descriptors that were not taken."""
        return len(self._fds)

    def take_fds(self) -> list[int]:
        """The descriptors; the caller owns them from now on."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close the descriptors that nobody took. Idempotent."""
        discard(self.take_fds())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<Message {self.request}: flags {self.flags:#x}, {len(self.payload)} bytes, {self.fd_count} descriptors>"
        )


class Connection:
    """A connected vhost-user socket. Takes ownership of ``connection``; errors call the other end ``peer``.

    ``timeout_s`` bounds each message, sent or received, for which no deadline is given. Only one thread at a time may
    use it. After an error or an interruption, `cut` says whether only `close` is still possible.
    """

    def __init__(self, connection: socket.socket, peer: str, *, timeout_s: float | None = None) -> None:
        connection.setblocking(False)
        self._socket = connection
        self.peer = peer
        self.timeout_s = timeout_s
        self.cut = False
        """Whether a transfer ended in the middle of a message, so that the position in the stream is not known."""
        self.sent = 0
        """How many whole messages were sent."""
        self.received = 0
        """How many whole messages were received."""
        self.ended = False
        """Whether the peer has closed, between two messages."""
        self._part = bytearray()
        """What was received of a message that is not complete yet."""
        self._part_fds: list[int] = []
        self._part_deadline = Deadline(None)
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)

    @property
    def peer_process(self) -> int:
        """The process ID of the peer; 0 if it is in another PID namespace."""
        return credentials_of(self._socket).pid

    @classmethod
    def connect(cls, path: str, *, timeout_s: float | None = None) -> Self:
        """Connect to the socket at ``path``, trying again until ``timeout_s`` while nobody listens.

        Raises `ConnectionLost` if nobody does (at once, without a ``timeout_s``), OSError as connect(2) does.
        """
        deadline = Deadline(0.0 if timeout_s is None else timeout_s)
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                connection.connect(path)
                return cls(connection, path, timeout_s=timeout_s)
            except OSError as error:
                connection.close()
                if error.errno not in _RETRY:
                    raise
                if deadline.passed:
                    why = f"nobody listens there ({os.strerror(error.errno or 0)})"
                    raise ConnectionLost("connect", peer=path, why=why) from None
            time.sleep(_RETRY_S)

    @classmethod
    def from_fd(cls, fd: int, *, timeout_s: float | None = None) -> Self:
        """A connection over socket ``fd``; takes ownership of ``fd``, also if it raises OSError.

        ENOTSOCK if it is not a socket, EPROTOTYPE if it is not an AF_UNIX stream, ENOTCONN if it has no peer.
        """
        connection = _socket_of(fd)
        try:
            if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
                raise OSError(errno.EPROTOTYPE, "it is not a UNIX stream socket")
            connection.getpeername()
        except OSError:
            # it may be a socket of any kind, from another process
            discard([connection.detach()])
            raise
        return cls(connection, f"descriptor {fd}", timeout_s=timeout_s)

    def fileno(self) -> int:
        """The socket; borrowed. -1 when closed."""
        return self._socket.fileno()

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        deadline: Deadline | None = None,
    ) -> None:
        """Send one message; ``fds`` are borrowed. Raises `ConnectionLost`, `DeadlineExceeded`."""
        deadline = deadline or Deadline(self.timeout_s)
        data = memoryview(HEADER.pack(request, flags, len(payload)) + payload)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        begun = False
        while True:
            try:
                # a signal's handler may raise after the kernel has taken the data
                self.cut = True
                sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
                data = data[sent:]
                if not data:
                    self.sent += 1
                    self.cut = False
                    return
                begun = True
                ancillary = []
            except BlockingIOError:
                self.cut = begun
                self._await_room(deadline, f"send message {request}")
            except OSError as error:
                raise self._lost(f"send message {request}", request, error) from None

    def receive(self, *, deadline: Deadline | None = None) -> Message | None:
        """The next message; None if the peer closed between two messages.

        Raises `ProtocolError` for something that is not a message, `ConnectionLost` if the peer closed in the middle of
        one, `DeadlineExceeded`. If it raises, no descriptor stays open.
        """
        deadline = deadline or Deadline(self.timeout_s)
        try:
            message = None
            while message is None and not self.ended:
                self._await(deadline)
                message = self.take_in()
        except BaseException:
            self._part.clear()
            discard(self._take_part_fds())
            raise
        return message

    def take_in(self) -> Message | None:
        """Take in what has come of the next message, without waiting. Returns the message when it is complete.

        None: `ended` says whether the peer has closed; otherwise the rest is to come within `left_s`. Raises as
        `receive`, which may also be called at any time.
        """
        if self.fileno() < 0:
            raise self._lost("receive a message", error=OSError(errno.EBADF, "the connection was closed"))
        part, fds = self._part, self._part_fds
        while (missing := self._missing()) > 0:
            self.cut = True  # a signal's handler may raise after the kernel has given the data out
            whose = len(fds)
            came = self._receive_some(missing, fds)
            if came:
                if part:
                    # descriptors belong to the first byte: these belong to no message. There is room for them all the
                    # same: otherwise the kernel would close them in this thread, which may block
                    discard(fds[whose:])
                    del fds[whose:]
                else:
                    self._part_deadline = Deadline(self.timeout_s)
                part += came
            elif came is None:
                self.cut = bool(part)
                if part and self._part_deadline.passed:
                    raise DeadlineExceeded("receive a message", self.timeout_s or 0, device=self.peer)
                return None
            elif part:
                raise self._lost(f"receive a message: {missing} more bytes were to come")
            else:
                self.ended, self.cut = True, False
                return None
        request, flags, _ = HEADER.struct.unpack_from(part)
        message = Message(request, flags, bytes(part[HEADER.size_bytes :]), self._take_part_fds())
        part.clear()
        self.received += 1
        self.cut = False
        return message

    def left_s(self) -> float | None:
        """How long the rest of a message may take; None if no message has begun, or if there is no limit."""
        return self._part_deadline.left_s() if self._part else None

    def check(self) -> None:
        """Raise `ConnectionLost` if nothing can be sent to the peer any more."""
        try:
            self._socket.send(b"", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._lost("send a message", error=error) from None

    def close(self) -> None:
        """Close. Idempotent."""
        discard(self._take_part_fds())
        hang_up(self._socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Connection to {self.peer}{' (closed)' if self.fileno() < 0 else ''}>"

    def _check_header(self, request: int, flags: int, size: int) -> None:
        why = ""
        if flags & VERSION_MASK != VERSION:
            why = f"version {flags & VERSION_MASK}, not {VERSION}"
        elif flags & ~_KNOWN_FLAGS:
            why = f"unknown flags {flags & ~_KNOWN_FLAGS:#x}"
        elif size > PAYLOAD_SIZE_MAX:
            why = f"a payload of {size} bytes, and no message has more than {PAYLOAD_SIZE_MAX}"
        if why:
            raise ProtocolError(f"message {request}", peer=self.peer, why=why, request=request)

    def _missing(self) -> int:
        """How many bytes to ask for next. Raises `ProtocolError` for an invalid header."""
        have = len(self._part)
        if have < HEADER.size_bytes:
            return HEADER.size_bytes - have
        request, flags, size = HEADER.struct.unpack_from(self._part)
        if have == HEADER.size_bytes:
            self._check_header(request, flags, size)
        whole: int = HEADER.size_bytes + size
        return whole - have

    def _take_part_fds(self) -> list[int]:
        fds, self._part_fds = self._part_fds, []
        return fds

    def _receive_some(self, size: int, fds: list[int]) -> bytes | None:
        """Up to ``size`` bytes; empty if the peer has closed, None if nothing has come yet."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""
        except OSError as error:
            raise self._lost("receive a message", error=error) from None
        if ancillary or flags & _CTRUNC:
            self._keep_fds(ancillary, flags, fds)
        return data

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]], flags: int, fds: list[int]) -> None:
        fds.extend(fds_in(ancillary))
        if flags & _CTRUNC or len(fds) > FDS_MAX:
            why = f"more than {FDS_MAX} descriptors came with it"
            if len(fds) <= FDS_MAX:
                why = "this process has no room for all descriptors that came with it"
            raise ProtocolError("receive a message", peer=self.peer, why=why)

    def _await(self, deadline: Deadline) -> None:
        """Wait for something to read."""
        left_s = deadline.left_s()
        # every reply passes here: this does what `Deadline.wait` does, with a poll object that is made once
        if not self._readable.poll(None if left_s is None else left_s * 1000):
            raise DeadlineExceeded("receive a message", deadline.timeout_s or 0, device=self.peer)

    def _await_room(self, deadline: Deadline, what: str) -> None:
        if not deadline.wait({self._socket.fileno(): select.POLLOUT}):
            raise DeadlineExceeded(what, deadline.timeout_s or 0, device=self.peer)

    def _lost(self, what: str, request: int | None = None, error: OSError | None = None) -> ConnectionLost:
        gone = error is None or isinstance(error, ConnectionError)
        why = "the peer closed the connection" if gone else os.strerror(error.errno or 0) if error else ""
        return ConnectionLost(what, peer=self.peer, why=why, request=request)


def is_listening(fd: int) -> bool:
    """Whether socket ``fd`` (borrowed) listens; False if it is connected. Raises OSError if it is not a socket.

    The specification does not say which of the two ``--fd`` gives to a back-end, and back-ends differ.
    """
    with _socket_of(os.dup(fd)) as duplicate:
        return bool(duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _socket_of(fd: int) -> socket.socket:
    """A socket object that owns ``fd``. If it is not a socket, closes it and raises OSError."""
    try:
        return socket.socket(fileno=fd)
    except OSError:
        discard([fd])
        raise
