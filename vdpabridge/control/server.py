"""The side of the process that owns the device."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, Self

from ..errors import VdpaBridgeError
from .lines import INVALID_PARAMS, INVALID_REQUEST, METHOD_NOT_FOUND, PARSE_ERROR, REFUSED, Lines

__all__ = ["ControlServer", "Method"]

#: What a method gets: its parameters, and a function that takes the descriptor that came with the request.
Method = Callable[[Mapping[str, Any], Callable[[], int]], Any]
_CREDENTIALS = struct.Struct("3i")
#: For a client to take an answer in, or to end its line.
_PATIENCE_S = 2.0


class ControlServer:
    """Answers requests on ``listener``, which is taken. Call `serve` for each of `fds` that is readable.

    Only this user and root are listened to.
    """

    def __init__(self, listener: socket.socket, methods: Mapping[str, Method]) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._methods = methods
        self._clients: dict[int, Lines] = {}

    def fds(self) -> list[int]:
        """What to wait for; borrowed."""
        return [self._listener.fileno(), *self._clients]

    def serve(self, fd: int) -> None:
        """Do what there is to be done for ``fd``."""
        if fd == self._listener.fileno():
            self._accept()
            return
        client = self._clients[fd]
        try:
            alive = client.read()
            while client.has_line:
                self._answer(client, client.receive() or b"")
        except VdpaBridgeError:
            alive = False
        if not alive:
            del self._clients[fd]
            client.close()

    def close(self) -> None:
        """Close everything. Idempotent."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            _, uid, _ = _CREDENTIALS.unpack(credentials)
            if uid not in (0, os.geteuid()):
                connection.close()
                return
            connection.settimeout(_PATIENCE_S)
            self._clients[connection.fileno()] = Lines(connection)

    def _answer(self, client: Lines, line: bytes) -> None:
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": None}
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            client.send(answer | {"error": {"code": PARSE_ERROR, "message": str(error)}})
            return
        if (
            not isinstance(request, dict)
            or request.get("jsonrpc") != "2.0"
            or not isinstance(request.get("method"), str)
        ):
            client.send(answer | {"error": {"code": INVALID_REQUEST, "message": "that is no request"}})
            return
        answer["id"] = request.get("id")
        outcome = self._perform(client, request)
        if "id" in request:
            client.send(answer | outcome)

    def _perform(self, client: Lines, request: dict[str, Any]) -> dict[str, Any]:
        method = self._methods.get(request["method"])
        params = request.get("params", {})
        if method is None:
            known = ", ".join(self._methods)
            message = f"there is no method {request['method']!r}; there are {known}"
            return {"error": {"code": METHOD_NOT_FOUND, "message": message}}
        if not isinstance(params, dict):
            return {"error": {"code": INVALID_PARAMS, "message": "parameters have names"}}

        def descriptor() -> int:
            fd = client.take_fd()
            if fd is None:
                raise VdpaBridgeError(request["method"], why="no descriptor came with the request")
            return fd

        try:
            return {"result": method(params, descriptor)}
        except Exception as error:  # noqa: BLE001  # a question must not end the process that owns the device
            names = ("device", "what", "why", "hint", "running")
            facts = {name: getattr(error, name) for name in names if getattr(error, name, "")}
            return {"error": {"code": REFUSED, "message": str(error), "data": facts}}
