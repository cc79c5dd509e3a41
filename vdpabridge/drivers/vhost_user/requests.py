"""Requests to a back-end: one call each, with its reply or acknowledgement, as the protocol's table has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ...abi.vhost_user import FLAG_NEED_REPLY, REPLY_FLAGS, VERSION, FrontendRequest, ProtocolFeature
from ...abi.vhost_user_payloads import U64, PayloadError
from ...abi.vhost_user_table import FRONTEND_REQUESTS
from ...errors import DeadlineExceeded
from ...vhost_user.connection import Connection, Message
from ...vhost_user.errors import ConnectionLost, PeerRefused, ProtocolError

__all__ = ["Requests"]

#: What a back-end answers when its work is done, which may last: requests in flight, a transfer.
_LENGTHY = frozenset(
    {
        FrontendRequest.GET_VRING_BASE,
        FrontendRequest.GET_VRING_BASE_SKIP_DRAIN,
        FrontendRequest.CHECK_DEVICE_STATE,
    }
)


class Requests:
    """Asks over ``connection``, which is taken. ``protocol_features`` are what was negotiated so far.

    What is no valid reply, or does not come in time, leaves the connection useless: `broken` says why.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.protocol_features = 0
        self.broken = ""
        self._owed: tuple[FrontendRequest, bytes] | None = None
        """What was asked and not answered in time, though it may be yet."""

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
            for fd in its_fds:
                os.close(fd)
            raise self.no_reply(request, f"{len(its_fds)} descriptors came with the reply")
        return reply

    def ask_with_fds(
        self, request: FrontendRequest, payload: Any = None, fds: Sequence[int] = ()
    ) -> tuple[Any, list[int]]:
        """The same, with the descriptors of the reply, which the caller owns."""
        spec = FRONTEND_REQUESTS[request]
        if self._owed != (request, _packed(payload)):
            self._send(request, payload, fds, VERSION)
        with self._reply_to(request, _packed(payload)) as message:
            try:
                # back-ends answer SET_LOG_BASE with 0, 8 or 16 bytes, and nothing in them matters
                reply = None if request is FrontendRequest.SET_LOG_BASE else spec.reply.unpack(message.payload)
            except PayloadError as error:
                raise self.no_reply(request, str(error)) from None
            if message.fd_count > spec.reply_fds[1]:
                raise self.no_reply(request, f"{message.fd_count} descriptors came with the reply")
            return reply, message.take_fds()

    def number(self, request: FrontendRequest) -> int:
        """The number that is the reply to ``request``."""
        value: int = self.ask(request).value
        return value

    def tell(self, request: FrontendRequest, payload: Any = None, fds: Sequence[int] = ()) -> None:
        """Send a request without a reply of its own, and wait until it is done. ``fds`` are borrowed.

        Raises `PeerRefused` where the back-end says so; one without REPLY_ACK can only close the connection.
        """
        self.tell_all([(request, payload, fds)])

    def tell_all(self, told: Sequence[tuple[FrontendRequest, Any, Sequence[int]]]) -> None:
        """The same for several requests, which are on their way all at once: that takes the time of one.

        Where some are refused, the first refusal is raised, when all have been answered.
        """
        acknowledged = self.has(ProtocolFeature.REPLY_ACK)
        for request, payload, fds in told:
            self._send(request, payload, fds, VERSION | (FLAG_NEED_REPLY if acknowledged else 0))
        if not acknowledged:
            # any reply tells that what was sent before it is done; QEMU takes this one as well
            self.number(FrontendRequest.GET_FEATURES)
            return
        refusals = []
        for request, _, _ in told:
            try:
                self._acknowledged(request)
            except PeerRefused as refusal:
                refusals.append(refusal)
        if refusals:
            raise refusals[0]

    def _acknowledged(self, request: FrontendRequest) -> None:
        with self._reply_to(request) as message:
            try:
                code = U64.unpack(message.payload).value
            except PayloadError as error:
                raise self.no_reply(request, str(error)) from None
            if message.fd_count:
                raise self.no_reply(request, f"{message.fd_count} descriptors came with the acknowledgement")
        if code:
            why = f"the back-end refused it (code {code:#x})"
            raise PeerRefused(request.name, peer=self.peer, why=why, request=request, code=code)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.connection.close()

    def _send(self, request: FrontendRequest, payload: Any, fds: Sequence[int], flags: int) -> None:
        if self.broken:
            raise ConnectionLost(request.name, peer=self.peer, why=self.broken, request=request)
        self._collect_debt()
        try:
            self.connection.send(request, _packed(payload), fds, flags=flags)
        except (ProtocolError, DeadlineExceeded) as error:
            self.broken = error.why
            raise

    def _collect_debt(self) -> None:
        """Take in the reply that came too late. Whether state had arrived is asked again where it matters; where a
        ring stopped is not told twice."""
        if self._owed is not None:
            request, payload = self._owed
            self._reply_to(request, payload).close()
            if request is not FrontendRequest.CHECK_DEVICE_STATE:
                raise self.no_reply(request, "its reply came too late, and something else was asked first")

    def _reply_to(self, request: FrontendRequest, payload: bytes = b"") -> Message:
        try:
            message = self.connection.receive()
        except DeadlineExceeded as error:
            why = f"no reply within {error.timeout_s:g} s"
            if request in _LENGTHY and not self.connection.cut:
                self._owed = (request, payload)
            else:
                self.broken = f"{request.name}: {why}"
            hint = "the back-end is stuck or slow"
            raise DeadlineExceeded(request.name, error.timeout_s, device=self.peer, hint=hint) from None
        except ProtocolError as error:
            self.broken = error.why
            raise
        self._owed = None
        if message is None:
            self.broken = "the back-end closed the connection"
            raise ConnectionLost(request.name, peer=self.peer, why=self.broken, request=request)
        if message.request != request or message.flags != REPLY_FLAGS:
            message.close()
            raise self.no_reply(request, f"the reply is to request {message.request} with flags {message.flags:#x}")
        return message

    def no_reply(self, request: FrontendRequest, why: str) -> ProtocolError:
        """Note that the reply to ``request`` is none; returns the error to raise."""
        self.broken = why
        return ProtocolError(request.name, peer=self.peer, why=why, request=request)


def _packed(payload: Any) -> bytes:
    data: bytes = b"" if payload is None else payload.pack()
    return data
