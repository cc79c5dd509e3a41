"""Requests to a back-end: one call each, with its reply or acknowledgement, as the protocol's table has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ...abi.vhost_user import FLAG_NEED_REPLY, REPLY_FLAGS, VERSION, FrontendRequest, ProtocolFeature
from ...abi.vhost_user_payloads import U64, PayloadError
from ...abi.vhost_user_table import FRONTEND_REQUESTS
from ...errors import ConnectionLost, DeadlineExceeded, PeerRefused, ProtocolError
from ...linux.deadline import TimeLimit
from ...linux.descriptors import discard
from ...vhost_user.connection import Connection, Message

__all__ = ["BackendRequests", "Told"]

#: Requests that a back-end answers only when its work is done, which may take long: requests in flight, a transfer.
_LENGTHY = frozenset(
    {
        FrontendRequest.GET_VRING_BASE,
        FrontendRequest.GET_VRING_BASE_SKIP_DRAIN,
        FrontendRequest.CHECK_DEVICE_STATE,
    }
)


#: How many messages may be unanswered at a time. A back-end whose answers are not read stops reading; and the kernel
#: counts descriptors in flight against RLIMIT_NOFILE (net/unix/garbage.c).
_WINDOW = 32


class _Asked(NamedTuple):
    """A request that gets a reply; recorded before it is sent, so that the records are right after any interruption."""

    request: FrontendRequest
    payload: bytes
    message_number: int
    """Which message of ours it is."""
    reply_number: int
    """Which message of the back-end's is the reply."""


Told = tuple[FrontendRequest, Any, Sequence[int]]


class BackendRequests:
    """Asks over ``connection``, of which it takes ownership. ``protocol_features`` are what was negotiated so far.

    A reply that is not valid, or does not come in time, makes the connection useless: `broken` says why. If an
    exception ended the wait for a reply, that reply is read before the next request is sent.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.limit = TimeLimit(connection.timeout_s)
        """Bounds every wait."""
        self.protocol_features = 0
        self.broken = ""
        self.on_late: Callable[[FrontendRequest, Any], None] = lambda _request, _reply: None
        """Called with replies that came too late for the caller that asked."""
        self._asked: deque[_Asked] = deque()

    @property
    def peer(self) -> str:
        """What errors call the back-end."""
        return self.connection.peer

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether ``feature`` was negotiated."""
        return bool(self.protocol_features >> feature & 1)

    def ask(self, request: FrontendRequest, payload: Any = None, fds: Sequence[int] = ()) -> Any:
        """Send ``request`` (``fds`` are borrowed) and return the payload of its own reply."""
        reply, its_fds = self.ask_with_fds(request, payload, fds)
        if its_fds:
            discard(its_fds)
            raise self.no_reply(request, f"{len(its_fds)} descriptors came with the reply")
        return reply

    def ask_with_fds(
        self, request: FrontendRequest, payload: Any = None, fds: Sequence[int] = ()
    ) -> tuple[Any, list[int]]:
        """Like `ask`, with the descriptors of the reply, which the caller owns."""
        spec = FRONTEND_REQUESTS[request]
        if not self._is_awaited(request, payload):
            self._collect()
            self._send(request, payload, fds, VERSION, replied=True)
        with self._reply() as message:
            reply = self._unpacked(request, message)
            if message.fd_count > spec.reply_fds[1]:
                raise self.no_reply(request, f"{message.fd_count} descriptors came with the reply")
            return reply, message.take_fds()

    def ask_u64(self, request: FrontendRequest) -> int:
        """The number that is the reply to ``request``."""
        value: int = self.ask(request).value
        return value

    def tell(self, request: FrontendRequest, payload: Any = None, fds: Sequence[int] = ()) -> None:
        """Send a request without a reply of its own, and wait until it is done. ``fds`` are borrowed.

        Raises `PeerRefused` if the back-end refuses; one without REPLY_ACK can only close the connection.
        """
        self.tell_all([(request, payload, fds)])

    def tell_all(self, told: Iterable[Told]) -> None:
        """Like `tell`, for several requests, many of them under way at once: that takes about the time of one.

        If some are refused, this raises the first refusal, after all have been answered.
        """
        self._collect()
        acknowledged = self.has(ProtocolFeature.REPLY_ACK)
        refusals: list[PeerRefused] = []
        for number, (request, payload, fds) in enumerate(told, 1):
            while len(self._asked) >= _WINDOW:
                self._acknowledged(refusals)
            if not acknowledged and number % _WINDOW == 0:
                self.ask_u64(FrontendRequest.GET_FEATURES)
            self._send(request, payload, fds, VERSION | (FLAG_NEED_REPLY if acknowledged else 0), replied=acknowledged)
        if not acknowledged:
            # any reply tells that everything sent before is done; QEMU uses this request too
            self.ask_u64(FrontendRequest.GET_FEATURES)
        while self._asked:
            self._acknowledged(refusals)
        if refusals:
            raise refusals[0]

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.connection.close()

    def no_reply(self, request: FrontendRequest, why: str) -> ProtocolError:
        """Note that the reply to ``request`` is not valid; returns the error to raise."""
        self.broken = self.broken or why
        return ProtocolError(request.name, peer=self.peer, why=why, request=request)

    # --- the records ---

    def _settle(self) -> None:
        """Remove requests that were not sent after all, and those whose reply was read without being handled here."""
        while self._asked and self._asked[-1].message_number > self.connection.sent:
            self._asked.pop()
        while self._asked and self._asked[0].reply_number <= self.connection.received:
            self._asked.popleft()

    def _is_awaited(self, request: FrontendRequest, payload: Any) -> bool:
        """Whether exactly this request was sent before, and is the only one without an answer."""
        self._settle()
        return (
            request in _LENGTHY
            and len(self._asked) == 1
            and self._asked[0].request is request
            and self._asked[0].payload == _packed(payload)
        )

    def _collect(self) -> None:
        """Read the replies that nobody has waited for."""
        self._settle()
        while self._asked:
            request = self._asked[0].request
            with self._reply() as message:
                if FRONTEND_REQUESTS[request].reply is not None:
                    self.on_late(request, self._unpacked(request, message))

    def _send(self, request: FrontendRequest, payload: Any, fds: Sequence[int], flags: int, *, replied: bool) -> None:
        connection = self.connection
        if not self.broken and connection.cut:
            self.broken = "it was interrupted in the middle of a message"
        if self.broken:
            raise ConnectionLost(request.name, peer=self.peer, why=self.broken, request=request)
        data = _packed(payload)
        if replied:
            numbers = connection.sent + 1, connection.received + len(self._asked) + 1
            self._asked.append(_Asked(request, data, *numbers))
        try:
            connection.send(request, data, fds, flags=flags, deadline=self.limit.deadline())
        except (ProtocolError, DeadlineExceeded) as error:
            self.broken = error.why
            raise

    def _reply(self) -> Message:
        """The reply to the first request that is not answered yet."""
        request = self._asked[0].request
        if not self.broken and self.connection.cut:
            self.broken = "it was interrupted in the middle of a message"
        if self.broken:
            raise ConnectionLost(request.name, peer=self.peer, why=self.broken, request=request)
        try:
            message = self.connection.receive(deadline=self.limit.deadline())
        except DeadlineExceeded as error:
            if request not in _LENGTHY or self.connection.cut:
                self.broken = f"{request.name}: no reply within {error.timeout_s:g} s"
            hint = "the back-end is stuck or slow"
            raise DeadlineExceeded(request.name, error.timeout_s, device=self.peer, hint=hint) from None
        except ProtocolError as error:
            self.broken = error.why
            raise
        if message is None:
            self.broken = "the back-end closed the connection"
            raise ConnectionLost(request.name, peer=self.peer, why=self.broken, request=request)
        self._asked.popleft()
        if message.request != request or message.flags != REPLY_FLAGS:
            message.close()
            raise self.no_reply(request, f"the reply is to request {message.request} with flags {message.flags:#x}")
        return message

    def _unpacked(self, request: FrontendRequest, message: Message) -> Any:
        try:
            # back-ends answer SET_LOG_BASE with 0, 8 or 16 bytes, and nothing in them matters
            spec = FRONTEND_REQUESTS[request]
            return None if request is FrontendRequest.SET_LOG_BASE else spec.reply.unpack(message.payload)
        except PayloadError as error:
            raise self.no_reply(request, str(error)) from None

    def _acknowledged(self, refusals: list[PeerRefused]) -> None:
        """Read one acknowledgement; adds a refusal to ``refusals``."""
        request = self._asked[0].request
        with self._reply() as message:
            try:
                code = U64.unpack(message.payload).value
            except PayloadError as error:
                raise self.no_reply(request, str(error)) from None
            if message.fd_count:
                raise self.no_reply(request, f"{message.fd_count} descriptors came with the acknowledgement")
        if code:
            why = f"the back-end refused it (code {code:#x})"
            refusals.append(PeerRefused(request.name, peer=self.peer, why=why, request=request, code=code))


def _packed(payload: Any) -> bytes:
    data: bytes = b"" if payload is None else payload.pack()
    return data
