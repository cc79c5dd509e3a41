"""One front-end, from its first message to its last: decode, validate, perform, reply.

Source: docs/interop/vhost-user.rst, "Communication"; each request's row in `abi.vhost_user_table`.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import Any, Self

from ...abi.vhost_user import FLAG_NEED_REPLY, FLAG_REPLY, REPLY_FLAGS, FrontendRequest, ProtocolFeature
from ...abi.vhost_user_payloads import U64, PayloadError
from ...abi.vhost_user_table import FRONTEND_REQUESTS, PER_REGION, RequestSpec
from ...device import Capability, Device
from ...device.rules import ALTERNATIVES
from ...errors import MissingCapability, ProtocolError, VdpaBridgeError
from ...linux.deadline import Deadline
from ...linux.descriptors import discard
from ...vhost_user.connection import Connection, Message
from . import trace as tracing
from .handlers import HANDLERS, Answer, Handlers

__all__ = ["Session", "require_servable"]

_FAILED = 1
#: How long a front-end may not read its replies, of which a socket holds hundreds: all others wait meanwhile.
_REPLY_S = 1.0
#: How long a front-end may be silent between two SET_VRING_ENABLE. Much longer than any takes, and too short
#: for a guest to notice.
_ENABLE_S = 0.1
_RING_REQUESTS = frozenset({FrontendRequest.SET_VRING_ENABLE, FrontendRequest.SET_VRING_KICK})


class Session:
    """Serves ``device`` (borrowed) to the front-end at ``connection``; takes ownership of that. One thread only.

    ``report`` gets a line for each problem that a front-end cannot be told: the protocol has numbers, not reasons.
    ``trace`` is told of every message.
    """

    def __init__(
        self,
        device: Device,
        connection: Connection,
        *,
        report: Callable[[str], None],
        trace: Callable[[str], None] | None = None,
    ) -> None:
        try:
            require_servable(device)
            self._handlers = Handlers(device)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._report = report
        self._trace = trace
        self._closed = False
        self._enable_wait = Deadline(None)
        """How long enabled rings wait for what the front-end says about others."""

    @property
    def config_changed(self) -> int:
        """Readable when the device's configuration has changed: call `announce_config_change` then. Borrowed."""
        return self._handlers.config_changed

    @property
    def messages(self) -> int:
        """How many messages have come."""
        return self._connection.received

    @property
    def lost(self) -> bool:
        """Whether the device has failed, and cannot continue for this front-end."""
        return self._handlers.rings.lost

    @property
    def held(self) -> bool:
        """Whether the device is to stay suspended."""
        return self._handlers.rings.held

    def hold(self) -> None:
        """Suspend the device, whatever the front-end asks for meanwhile, until `release`; also if this raises."""
        self._handlers.rings.hold()

    def release(self) -> None:
        """Let the device do again what the front-end wants."""
        self._handlers.rings.release()
        self._wait_for_enable(begin_again=True)
        self._announce(self._handlers.announce_kept_change)

    def fileno(self) -> int:
        """The front-end's socket: call `serve_one` when it is readable. Borrowed."""
        return self._connection.fileno()

    def serve_one(self) -> bool:
        """Take one message, if all of it is there, and answer it; False if the front-end has left.

        Raises `ProtocolError` for an invalid message or a failure that no reply can tell, and `DeadlineExceeded` if the
        rest of a message does not come: the connection cannot be used any more then.
        """
        message = self._connection.take_in()
        if message is not None:
            with message:
                self._serve(message)
            self._wait_for_enable(begin_again=message.request in _RING_REQUESTS)
            self._announce(self._handlers.announce_kept_change)
        if self._enable_wait.passed:
            self._wait_no_longer()
        return not self._connection.ended

    def left_s(self) -> float | None:
        """How long to wait for a message, or the rest of one, before `serve_one` is called again; None: without a
        limit."""
        limits_s = [each for each in (self._connection.left_s(), self._enable_wait.left_s()) if each is not None]
        return min(limits_s, default=None)

    def _wait_for_enable(self, *, begin_again: bool) -> None:
        """Make enabled rings wait a while for what the front-end says about others."""
        if not self._handlers.rings.waiting:
            self._enable_wait = Deadline(None)
        elif begin_again or self._enable_wait.timeout_s is None:
            self._enable_wait = Deadline(_ENABLE_S)

    def _wait_no_longer(self) -> None:
        """Start with the rings that are enabled, whatever the front-end may still say."""
        self._enable_wait = Deadline(None)
        try:
            self._handlers.rings.wait_no_longer()
        except (VdpaBridgeError, ValueError, OSError) as error:
            # the front-end has sent no request that this could answer, and would wait for ever
            raise ProtocolError("start the rings", peer=self._connection.peer, why=str(error)) from error

    def is_leaving(self) -> bool:
        """Whether the front-end has hung up already, and only its last messages are left."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def announce_config_change(self) -> None:
        """Tell the front-end, and check the device's health: vDPA devices report a failure in the same way."""
        self._announce(self._handlers.announce_config_change)
        self._handlers.device.check_health()

    def _announce(self, announce: Callable[[], None]) -> None:
        try:
            announce()
        except VdpaBridgeError as error:
            self._report(f"a configuration change: {error}")

    def close(self) -> None:
        """Stop the device, which remembers everything, and hang up. Idempotent.

        Problems with the device are reported; they do not keep the session open.
        """
        if not self._closed:
            self._closed = True
            try:
                for problem in self._handlers.close():
                    self._report(f"when the front-end had left: {problem}")
            finally:
                self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session of {self._handlers.device!r}, {self._connection!r}>"

    # --- one message ---

    def _serve(self, message: Message) -> None:
        begin_ns = time.time_ns() if self._trace else 0
        fds = message.take_fds()
        try:
            request, spec, payload = self._understand(message, len(fds))
            answer, error = self._perform(request, payload, fds)
        finally:
            discard(fds)
        if request is FrontendRequest.SET_BACKEND_REQ_FD:
            # the descriptor may have been the front-end's end of this very connection
            self._connection.check()
        if self._trace:
            came = None if answer is None else answer.payload
            device_id = self._handlers.device.identity.device_id
            self._trace(tracing.line(request, payload, came, error, device_id=device_id, begin_ns=begin_ns))
        if answer is not None:
            self._reply(message.request, answer)
        elif error is not None and spec.reply is not None:
            # the front-end waits for a reply that does not exist
            raise ProtocolError(request.name, peer=self._connection.peer, why=str(error), request=request) from error
        else:
            self._acknowledge(message, error)

    def _understand(self, message: Message, fd_count: int) -> tuple[FrontendRequest, RequestSpec, Any]:
        """The request, its specification, and its payload. Raises `ProtocolError` for an invalid request."""
        try:
            request = FrontendRequest(message.request)
        except ValueError:
            raise self._broken(message, f"there is no request {message.request}") from None
        spec = FRONTEND_REQUESTS[request]
        if message.flags & FLAG_REPLY:
            raise self._broken(message, "it is a reply, and nothing was asked")
        if request not in HANDLERS:
            raise self._broken(message, "the device has no use for it, and did not offer it")
        if spec.needs is not None and not self._handlers.has(spec.needs):
            raise self._broken(message, f"{spec.needs.name} was not negotiated")
        try:
            payload = spec.payload.unpack(message.payload)
        except PayloadError as error:
            raise self._broken(message, str(error)) from None
        fewest, most = spec.fds
        if fewest == PER_REGION:
            fewest = most = len(payload.regions)
        if not fewest <= fd_count <= most:
            expected = str(most) if fewest == most else f"{fewest} to {most}"
            raise self._broken(message, f"{fd_count} descriptors came with it, not {expected}")
        return request, spec, payload

    def _perform(
        self, request: FrontendRequest, payload: Any, fds: list[int]
    ) -> tuple[Answer | None, Exception | None]:
        try:
            answer = self._handlers.perform(request, payload, fds)
        except Exception as error:  # noqa: BLE001  # an error that a front-end causes ends only its request
            kind = "" if isinstance(error, (VdpaBridgeError, ValueError, OSError)) else f"{type(error).__name__}: "
            self._report(f"{request.name}: {kind}{error}")
            return None, error
        if answer is not None and answer.error is not None:
            self._report(f"{request.name}: {answer.error}")
        return answer, None

    def _reply(self, request: int, answer: Answer) -> None:
        try:
            data = answer.payload.pack()
            self._connection.send(request, data, answer.fds, flags=REPLY_FLAGS, deadline=Deadline(_REPLY_S))
        finally:
            for fd in answer.fds:
                os.close(fd)

    def _acknowledge(self, message: Message, error: Exception | None) -> None:
        if message.flags & FLAG_NEED_REPLY and self._handlers.has(ProtocolFeature.REPLY_ACK):
            data = U64(_FAILED if error else 0).pack()
            self._connection.send(message.request, data, flags=REPLY_FLAGS, deadline=Deadline(_REPLY_S))
        elif error is not None:
            # no reply can tell the front-end, which must not continue as if all were well
            why = f"it failed, and no acknowledgement was asked for: {error}"
            raise self._broken(message, why) from error

    def _broken(self, message: Message, why: str) -> ProtocolError:
        name = FrontendRequest(message.request).name if message.request in _NUMBERS else f"message {message.request}"
        return ProtocolError(name, peer=self._connection.peer, why=why, request=message.request)


_NUMBERS = frozenset(map(int, FrontendRequest))


def require_servable(device: Device) -> None:
    """Raise `MissingCapability` for a device that cannot be stopped without losing its queues' positions."""
    if Capability.SUSPEND not in device.capabilities:
        alternative = ALTERNATIVES[Capability.SUSPEND]
        raise MissingCapability(device.name, "serve by vhost-user", Capability.SUSPEND.value, alternative)
