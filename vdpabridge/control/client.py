"""The client's side of the control socket."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, Self

from ..errors import VdpaBridgeError
from .lines import Lines

__all__ = ["ControlClient", "ControlError"]


class ControlError(VdpaBridgeError):
    """The process that owns the device refused. ``code`` is JSON-RPC's, ``kind`` one of `lines.KINDS`, or empty."""

    def __init__(self, method: str, path: str, error: Mapping[str, Any]) -> None:
        """``error`` is what the process at socket ``path`` answered."""
        facts = error.get("data", {})
        super().__init__(
            facts.get("what", method),
            device=facts.get("device", path),
            why=facts.get("why", error["message"]),
            hint=facts.get("hint", ""),
        )
        self.code: int = error["code"]
        self.kind: str = facts.get("kind", "")
        self.steps: list[dict[str, Any]] = facts.get("steps", [])
        """What a procedure had done before it failed."""


class ControlClient:
    """Asks the process whose control socket is at ``path``. ``timeout_s`` bounds each wait for its data."""

    def __init__(self, path: str, *, timeout_s: float | None = None) -> None:
        self.path = path
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            hint = "'vdpabridge serve --control PATH' listens there"
            raise VdpaBridgeError("connect", device=path, why=os.strerror(error.errno or 0), hint=hint) from error
        self._lines = Lines(connection)
        self._number = 0

    def ask(
        self, method: str, fd: int | None = None, *, progress: Callable[[int], None] | None = None, **params: Any
    ) -> Any:
        """The result of ``method``. ``fd`` (borrowed) goes with it. Raises `ControlError`.

        ``progress`` is called now and then with the number of bytes of device state moved so far.
        """
        self._number += 1
        if progress is not None:
            params["progress"] = True
        request = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        self._lines.send(request, () if fd is None else (fd,))
        # notifications of progress come first, and perhaps the late answer to an earlier request
        while (answer := self._receive(method)).get("id") != self._number:
            if progress is not None and answer.get("method") == "progress":
                progress(answer["params"]["state_bytes"])
        if (error := answer.get("error")) is not None:
            raise ControlError(method, self.path, error)
        return answer["result"]

    def _receive(self, method: str) -> dict[str, Any]:
        line = self._lines.receive()
        if line is None:
            raise VdpaBridgeError(method, device=self.path, why="the process that owns the device has ended")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise VdpaBridgeError(method, device=self.path, why=f"the answer is not JSON: {error}") from None
        if not isinstance(message, dict):
            raise VdpaBridgeError(method, device=self.path, why=f"{message!r} is not an answer")
        return message

    def leave(self) -> None:
        """Tell the server that nobody waits for an answer any more. A thread that waits in `ask` stops waiting."""
        self._lines.end()

    def close(self) -> None:
        """Close. Idempotent."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
