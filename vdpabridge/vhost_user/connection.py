"""One end of a vhost-user socket: whole messages in and out, descriptors with them, a deadline on everything.

Source: docs/interop/vhost-user.rst, "Message Specification" and "Communication": descriptors go with the first byte of
the header, and are looked for there only. The kernel closes those that come with a payload.
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
#: As a plain number: an enumeration's own arithmetic takes longer than the system call beside it.
_CTRUNC = int(socket.MSG_CTRUNC)
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_PER_MESSAGE_MAX * _FD_BYTES)
_KNOWN_FLAGS = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY
#: A socket's file appears a moment before its process listens on it.
_RETRY = (errno.ECONNREFUSED, errno.ENOENT)
_RETRY_S = 0.01


class Message:
    """A message as it came. Owns its descriptors until they are taken; closes the rest."""

    __slots__ = ("_fds", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self._fds = fds

    @property
    def fd_count(self) -> int:
        """Descriptors that were not taken."""
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
    """A connected vhost-user socket. Takes ``connection``; ``peer`` is what errors call the other end.

    ``timeout_s`` bounds each message, sent or received, for which no deadline is given. One thread at a time. After an
    error, an interruption too, `cut` says whether the connection is good for nothing but `close`.
    """

    def __init__(self, connection: socket.socket, peer: str, *, timeout_s: float | None = None) -> None:
        connection.setblocking(False)
        self._socket = connection
        self.peer = peer
        self.timeout_s = timeout_s
        self.cut = False
        """Whether something has ended in the middle of a message, and the stream's position is not known any more."""
        self.sent = 0
        """How many whole messages have gone."""
        self.received = 0
        """How many whole messages have come."""
        self.ended = False
        """Whether the peer has closed, between two messages."""
        self._part = bytearray()
        """What has come of a message that is not whole yet."""
        self._part_fds: list[int] = []
        self._part_deadline = Deadline(None)
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)

    @property
    def peer_process(self) -> int:
        """The number of the peer's process; 0 for one of another PID namespace."""
        return credentials_of(self._socket).pid

    @classmethod
    def connect(cls, path: str, *, timeout_s: float | None = None) -> Self:
        """Connect to the socket at ``path``, trying again until ``timeout_s`` while nobody listens.

        Raises `ConnectionLost` where nobody does (at once, with no ``timeout_s``), OSError as connect(2) does.
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
        """The connected socket ``fd``, which is taken, also where OSError is raised.

        ENOTSOCK for what is none, EPROTOTYPE for one that is no AF_UNIX stream, ENOTCONN for one without a peer.
        """
        connection = _socket_of(fd)
        try:
            if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
                raise OSError(errno.EPROTOTYPE, "it is no UNIX stream socket")
            connection.getpeername()
        except OSError:
            # somebody else's, of any kind
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
                # an exception of a signal's handler may come when the kernel has the data already
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
        """The next message; None where the peer closed between two messages.

        Raises `ProtocolError` for what is no message, `ConnectionLost` where the peer closed in the middle of one,
        `DeadlineExceeded`. No descriptor stays open where it raises.
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
        """Take in what is there of the next message, without waiting. The message when it is whole.

        None: `ended` says whether the peer has closed; else the rest is still to come, within `left_s`. Raises as
        `receive`, which may be called at any time too.
        """
        if self.fileno() < 0:
            raise self._lost("receive a message", error=OSError(errno.EBADF, "the connection was closed"))
        part, fds = self._part, self._part_fds
        while (missing := self._missing()) > 0:
            self.cut = True  # an exception of a signal's handler may come when the kernel has given the data out
            whose = len(fds)
            came = self._receive_some(missing, fds)
            if came:
                if part:
                    # descriptors belong to the first byte: these are nobody's. Room is made for them all the same: else
                    # the kernel closes them in this thread, and may wait for that
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
        """How long the rest of a message may take; None if none has begun, or for ever."""
        return self._part_deadline.left_s() if self._part else None

    def check(self) -> None:
        """Raise `ConnectionLost` if the peer cannot be sent anything any more."""
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
        """How many bytes are to be asked for next. Raises `ProtocolError` for a header that is none."""
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
        """Up to ``size`` bytes, nothing where the peer has closed; None where there is nothing yet."""
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
        # in the path of every reply: what `Deadline.wait` does, with a set that is made once
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
    """Whether socket ``fd`` (borrowed) is one to accept from; False for a connected one. Raises OSError for no socket.

    The specification leaves open which of the two ``--fd`` hands to a back-end, and back-ends differ.
    """
    with _socket_of(os.dup(fd)) as duplicate:
        return bool(duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _socket_of(fd: int) -> socket.socket:
    """A socket object that owns ``fd``, which is closed where it is no socket."""
    try:
        return socket.socket(fileno=fd)
    except OSError:
        discard([fd])
        raise
