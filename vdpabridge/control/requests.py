"""A request of the control socket: what it asks for, and the client that asks."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DeadlineExceeded, MissingCapability
from ..linux.descriptors import discard
from ..state.report import Report
from .lines import INVALID_PARAMS, INVALID_REQUEST, PARSE_ERROR, REFUSED, TIMED_OUT, UNABLE

__all__ = ["Caller", "InvalidRequest", "Method", "Params", "Request", "outcome", "refused", "steps_of"]

Params = Mapping[str, Any]
#: The answer to a request without its id: ``result`` or ``error``.
Outcome = dict[str, Any]


class Caller:
    """The client at one connection. It is the holder of a device that is held "by a connection"."""

    def __init__(self) -> None:
        self.holders: set[object] = set()
        """What holds the device because of it, and is to be released when it has left."""
        self.gone = False
        self.listens = False
        """Whether it wants to be told of events."""


class Request:
    """A request of ``caller``. Owns ``fds`` until `take_fd` or `close`."""

    def __init__(self, method: str, params: Params, number: object, *, wants_answer: bool, caller: Caller) -> None:
        self.method = method
        self.params = params
        self.number = number
        """The request's ``id``, which the answer repeats."""
        self.wants_answer = wants_answer
        self.caller = caller
        self.fds: list[int] = []
        self.cancel_fd: int | None = None
        """Readable when the request is to end early; owned by the request."""
        self.notify: Callable[[str, Params], None] = _nobody
        """Sends the caller a notification; if it does not read at once, it misses it."""

    @classmethod
    def parse(cls, line: bytes, caller: Caller) -> Request:
        """The request that is on ``line``. Raises `InvalidRequest`."""
        try:
            request = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(PARSE_ERROR, str(error)) from None
        if (
            not isinstance(request, dict)
            or request.get("jsonrpc") != "2.0"
            or not isinstance(request.get("method"), str)
            or not _is_id(request.get("id"))
        ):
            raise InvalidRequest(INVALID_REQUEST, "that is not a request")
        params = request.get("params", {})
        if not isinstance(params, dict):
            raise InvalidRequest(
                INVALID_PARAMS, "parameters must have names", request.get("id"), silent="id" not in request
            )
        return cls(request["method"], params, request.get("id"), wants_answer="id" in request, caller=caller)

    def take_fd(self) -> int | None:
        """The next descriptor that came with the request, owned by the caller from now on."""
        return self.fds.pop(0) if self.fds else None

    def make_cancellable(self) -> None:
        """Give it a `cancel_fd`. Raises OSError if there is no descriptor left for it."""
        self.cancel_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def cancel(self) -> bool:
        """Make it end early if it can; returns whether it can."""
        if self.cancel_fd is None:
            return False
        os.eventfd_write(self.cancel_fd, 1)
        return True

    def close(self) -> None:
        """Close what it owns. Idempotent."""
        fds, self.fds = self.fds, []
        discard(fds)
        cancel_fd, self.cancel_fd = self.cancel_fd, None
        if cancel_fd is not None:
            os.close(cancel_fd)


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the control socket."""

    act: Callable[[Request], Any]
    """Does it, in the device's thread, and returns the result."""
    meanwhile: Callable[[Request], Any] | None = None
    """Answers instead of `act`, without asking the device, while the device's thread is busy."""
    cancellable: bool = False
    """Whether it ends early when `Request.cancel_fd` is readable, which it becomes when the caller leaves."""
    only_for_present: bool = False
    """Whether it is not done for a caller that has left before it begins: he takes it for not done."""
    at_once: bool = False
    """Whether `act` does not need the device: then it is called without waiting for the device's thread."""


class InvalidRequest(Exception):
    """A line that is not a request; ``silent`` if nobody wants an answer to it."""

    def __init__(self, code: int, message: str, number: object = None, *, silent: bool = False) -> None:
        super().__init__(message)
        self.outcome: Outcome = {"error": {"code": code, "message": message}}
        self.number = number
        self.silent = silent


def outcome(act: Callable[[Request], Any], request: Request) -> Outcome:
    """Do ``act`` for ``request``; returns its result or its error."""
    try:
        return {"result": act(request)}
    except Exception as error:  # noqa: BLE001  # a request must not end the process that owns the device
        return refused(error)


def refused(error: Exception) -> Outcome:
    """The outcome that tells a client of ``error``."""
    names = ("device", "what", "why", "hint", "running")
    facts = {name: getattr(error, name) for name in names if getattr(error, name, "")}
    if kind := _kind_of(error):
        facts["kind"] = kind
    if isinstance(report := getattr(error, "report", None), Report):
        facts["steps"] = steps_of(report)
    return {"error": {"code": REFUSED, "message": str(error), "data": facts}}


def steps_of(report: Report) -> list[dict[str, Any]]:
    """The steps of ``report`` in the form that clients get."""
    return [dataclasses.asdict(step) for step in report.steps]


def _nobody(_method: str, _params: Params) -> None: ...


def _no_constant(name: str) -> float:
    """Refuse NaN and infinity: Python's parser accepts them, and JSON does not have them."""
    raise ValueError(f"{name} is not JSON")


def _is_id(value: object) -> bool:
    if isinstance(value, float):
        # 1e999 is a number in JSON, and too large for Python
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))


def _kind_of(error: BaseException | None) -> str:
    """The kind of refusal, for programs, from the error or its causes; empty for every other error."""
    while error is not None:
        if isinstance(error, DeadlineExceeded):
            return TIMED_OUT
        if isinstance(error, MissingCapability):
            return UNABLE
        error = error.__cause__
    return ""
