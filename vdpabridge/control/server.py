"""The side of the process that owns the device."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from ..errors import DeadlineExceeded, MissingCapability, VdpaBridgeError
from ..linux.credentials import credentials_of
from .lines import (
    ANSWER_BYTES_MAX,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    REFUSED,
    TIMED_OUT,
    UNABLE,
    Lines,
)

__all__ = ["Caller", "ControlServer", "Method"]

_PAUSE_S = 0.1


class Caller:
    """Who asks, by ``lines`` (borrowed)."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self.when_gone: Callable[[], object] | None = None
        """Called once when the connection ends."""

    def take_fd(self) -> int | None:
        """The descriptor that came with the request, owned by who takes it."""
        return self._lines.take_fd()

    def notify(self, method: str, params: dict[str, Any]) -> None:
        """Tell of something by the way; who does not read at once misses it."""
        self._lines.try_send({"jsonrpc": "2.0", "method": method, "params": params})


#: What a method gets: its parameters, and who asks.
Method = Callable[[Mapping[str, Any], Caller], Any]


class ControlServer:
    """Answers requests on ``listener``, which is taken. Call `serve` for each of `fds` that is readable.

    Only this user and root are listened to. ``report`` is told what no client is there to hear.
    """

    def __init__(
        self, listener: socket.socket, methods: Mapping[str, Method], *, report: Callable[[str], None]
    ) -> None:
        listener.setblocking(False)
        self._report = report
        self._listener = listener
        self._methods = methods
        self._clients: dict[int, tuple[Lines, Caller]] = {}

    def fds(self) -> list[int]:
        """What to wait for; borrowed."""
        return [self._listener.fileno(), *self._clients]

    def serve(self, fd: int) -> None:
        """Do what there is to be done for ``fd``."""
        if fd == self._listener.fileno():
            self._accept()
            return
        client, caller = self._clients[fd]
        try:
            alive = client.read()
            while client.has_line:
                self._answer(client, caller, client.receive() or b"")
                client.drop_fds()
        except VdpaBridgeError:
            alive = False
        if not alive:
            self._let_go(fd)

    def close(self) -> None:
        """Close everything. Idempotent."""
        for fd in list(self._clients):
            self._let_go(fd)
        self._listener.close()

    def _let_go(self, fd: int) -> None:
        client, caller = self._clients.pop(fd)
        client.close()
        if caller.when_gone is not None:
            try:
                caller.when_gone()
            except Exception as error:  # noqa: BLE001  # who has left must not end the process that owns the device
                self._report(f"when a client of the control socket had left: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # out of descriptors, perhaps; whoever waits there still waits then
            self._report(f"a client of the control socket cannot be let in: {error.strerror}")
            time.sleep(_PAUSE_S)
            return
        if credentials_of(connection).uid not in (0, os.geteuid()):
            connection.close()
            return
        # whoever does not read its answers is hung up on, when they fill this
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ANSWER_BYTES_MAX)
        connection.setblocking(False)
        client = Lines(connection)
        self._clients[connection.fileno()] = client, Caller(client)

    def _answer(self, client: Lines, caller: Caller, line: bytes) -> None:
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": None}
        try:
            request = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            client.send(answer | {"error": {"code": PARSE_ERROR, "message": str(error)}})
            return
        if (
            not isinstance(request, dict)
            or request.get("jsonrpc") != "2.0"
            or not isinstance(request.get("method"), str)
            or not _is_id(request.get("id"))
        ):
            client.send(answer | {"error": {"code": INVALID_REQUEST, "message": "that is no request"}})
            return
        answer["id"] = request.get("id")
        outcome = self._perform(caller, request)
        if "id" in request:
            client.send(answer | outcome)

    def _perform(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        method = self._methods.get(request["method"])
        params = request.get("params", {})
        if method is None:
            known = ", ".join(self._methods)
            message = f"there is no method {request['method']!r}; there are {known}"
            return {"error": {"code": METHOD_NOT_FOUND, "message": message}}
        if not isinstance(params, dict):
            return {"error": {"code": INVALID_PARAMS, "message": "parameters have names"}}
        try:
            return {"result": method(params, caller)}
        except Exception as error:  # noqa: BLE001  # a question must not end the process that owns the device
            names = ("device", "what", "why", "hint", "running")
            facts = {name: getattr(error, name) for name in names if getattr(error, name, "")}
            if kind := _kind_of(error):
                facts["kind"] = kind
            return {"error": {"code": REFUSED, "message": str(error), "data": facts}}


def _no_constant(name: str) -> float:
    """Python's JSON knows numbers that JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def _is_id(value: object) -> bool:
    if isinstance(value, float):
        # 1e999 is a number in JSON, and too large for Python
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))


def _kind_of(error: BaseException | None) -> str:
    """What kind of refusal it is, of those that a program tells apart; its cause may say."""
    while error is not None:
        if isinstance(error, DeadlineExceeded):
            return TIMED_OUT
        if isinstance(error, MissingCapability):
            return UNABLE
        error = error.__cause__
    return ""
