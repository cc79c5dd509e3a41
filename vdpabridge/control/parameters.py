"""The parameters of the control socket's methods: checked, and converted for the procedures."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import VdpaBridgeError
from ..linux.deadline import Deadline
from ..linux.descriptors import discard
from ..linux.files import replacing
from ..state.image.opening import open_image
from ..state.losses import Loss
from ..state.report import Report
from ..state.transfer.channel import Limits
from .requests import Request, steps_of

__all__ = ["accepted", "choice", "flag", "limits", "move_of", "required_move", "shown", "sink", "source"]

#: The name of a move.
_MOVE = re.compile(r"[\w.-]{1,64}", re.ASCII)
#: The time between two notifications of progress.
_INTERVAL_S = 0.2


def flag(request: Request, name: str) -> bool:
    """Parameter ``name``, which is true or false; false by default."""
    value = request.params.get(name, False)
    if not isinstance(value, bool):
        raise VdpaBridgeError(request.method, why=f"{name} {value!r} is neither true nor false")
    return value


def choice(request: Request, name: str, choices: tuple[object, ...]) -> Any:
    """Parameter ``name``, which is one of ``choices``; the first by default."""
    value = request.params.get(name, choices[0])
    if not any(value is each or (isinstance(value, str) and value == each) for each in choices):
        raise VdpaBridgeError(request.method, why=f"{name} {value!r} is not one of {', '.join(map(str, choices))}")
    return value


def move_of(request: Request) -> str | None:
    """Parameter ``move``, the name of a move; None if there is none."""
    name = request.params.get("move")
    if name is None or (isinstance(name, str) and _MOVE.fullmatch(name)):
        return name
    why = f"move {name!r} is not a name of up to 64 letters, digits, '.', '_' and '-'"
    raise VdpaBridgeError(request.method, why=why)


def required_move(request: Request) -> str:
    """The same, of a request that needs one."""
    if (name := move_of(request)) is None:
        raise VdpaBridgeError(request.method, why="move is missing", hint="name the move, as in 'load'")
    return name


def limits(request: Request, timeout_s: float | None) -> Limits:
    """What bounds the transfer that ``request`` asks for."""
    most = request.params.get("limit_bytes")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int)):
        raise VdpaBridgeError(request.method, why=f"limit_bytes {most!r} is not a number")
    progress = _progress(request) if request.params.get("progress") else None
    return Limits(Deadline(timeout_s), size_bytes=most, progress=progress, cancel_fd=request.cancel_fd)


@contextmanager
def sink(request: Request) -> Iterator[int]:
    """Where an image is to go: the descriptor that came with ``request``, or the file ``path``."""
    if (path := _path(request)) is not None:
        with replacing(path) as fd:
            yield fd
        return
    with _given(request) as fd:
        yield fd


@contextmanager
def source(request: Request, bounds: Limits) -> Iterator[int]:
    """Where an image is to come from: the descriptor that came with ``request``, or the file ``path``.

    If nobody writes to that yet, it is waited for within ``bounds``.
    """
    if (path := _path(request)) is None:
        with _given(request) as fd:
            yield fd
        return
    fd = open_image(path, bounds)
    try:
        yield fd
    finally:
        os.close(fd)


def accepted(request: Request) -> frozenset[Loss]:
    """The losses of state that the caller accepts."""
    words = request.params.get("accept", [])
    known = [loss.value for loss in Loss]
    if not isinstance(words, list) or any(word not in known for word in words):
        raise VdpaBridgeError("control socket", why=f"accept {words!r} is not a list of {', '.join(known)}")
    return frozenset(map(Loss, words))


def shown(report: Report) -> dict[str, Any]:
    """``report`` in the form that clients get."""
    return {
        "state_bytes": report.state_bytes,
        "copied_by": report.copied_by,
        "digest": report.digest.hex(),
        "steps": steps_of(report),
    }


@contextmanager
def _given(request: Request) -> Iterator[int]:
    fd = request.take_fd()
    if fd is None:
        why = "neither a descriptor nor a path came with the request"
        raise VdpaBridgeError(request.method, why=why, hint="send one of them")
    try:
        yield fd
    finally:
        # the client's own, which may be slow to close
        discard([fd])


def _path(request: Request) -> str | None:
    path = request.params.get("path")
    if path is None:
        return None
    if isinstance(path, str) and os.path.isabs(path) and _is_encodable(path):
        return path
    # the working directory of this process is not the client's
    raise VdpaBridgeError("control socket", why=f"path {path!r} is not an absolute path")


def _is_encodable(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _progress(request: Request) -> Callable[[int], None]:
    """A function that tells the client the number of bytes, now and then."""
    told_s = time.monotonic()

    def tell(state_bytes: int) -> None:
        nonlocal told_s
        if (now_s := time.monotonic()) - told_s >= _INTERVAL_S:
            told_s = now_s
            request.notify("progress", {"state_bytes": state_bytes})

    return tell
