"""The back-end's own requests, on a socket and a thread of their own."""

from __future__ import annotations

import os
import socket
import threading

from ...abi.vhost_user import FLAG_NEED_REPLY, REPLY_FLAGS, BackendRequest
from ...abi.vhost_user_payloads import U64
from ...errors import DeadlineExceeded, ProtocolError
from ...linux.eventfds import signal
from ...vhost_user.connection import Connection

__all__ = ["BackendChannel"]

_UNSUPPORTED = 1


class BackendChannel:
    """Listens to a back-end; signals `config_call` when its configuration has changed.

    Everything else that a back-end may ask for was not negotiated, and is refused.
    """

    def __init__(self, peer: str) -> None:
        ours, self._theirs = socket.socketpair()
        self._connection = Connection(ours, f"{peer} (its requests)")
        self._lock = threading.Lock()
        self._config_call: int | None = None
        self._thread = threading.Thread(target=self._listen, name="vdpabridge-backend-requests", daemon=True)
        self._thread.start()

    @property
    def backend_fd(self) -> int:
        """The back-end's end, to be sent with SET_BACKEND_REQ_FD; borrowed."""
        return self._theirs.fileno()

    def set_config_call(self, eventfd: int | None) -> None:
        """Signal a duplicate of ``eventfd`` (borrowed) from now on."""
        duplicate = None if eventfd is None else os.dup(eventfd)
        with self._lock:
            old, self._config_call = self._config_call, duplicate
        if old is not None:
            os.close(old)

    def close(self) -> None:
        """End the thread. Idempotent."""
        if self._theirs.fileno() >= 0:
            # the back-end has a duplicate, so only a shutdown wakes the thread
            self._theirs.shutdown(socket.SHUT_RDWR)
            self._theirs.close()
            self._thread.join()
            self._connection.close()
            self.set_config_call(None)

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.receive()
                if message is None:
                    return
                with message:
                    code = self._handle(message.request)
                    if message.flags & FLAG_NEED_REPLY:
                        self._connection.send(message.request, U64(code).pack(), flags=REPLY_FLAGS)
            except (ProtocolError, DeadlineExceeded):
                # the device itself is reached by another socket; without this one only its notifications are missing
                return

    def _handle(self, request: int) -> int:
        if request != BackendRequest.CONFIG_CHANGE_MSG:
            return _UNSUPPORTED
        with self._lock:
            signal(self._config_call)
        return 0
