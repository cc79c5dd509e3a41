"""Moves state from one process that owns a device to another, through a pipe between the two."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UsageError, VdpaBridgeError
from .client import ControlClient, ControlError

__all__ = ["MoveFailed", "move"]


class MoveFailed(VdpaBridgeError):
    """The state was not moved. ``side`` is the control socket of the process that caused this.

    ``steps`` are what each side has done, as far as it has said so.
    """

    def __init__(
        self,
        side: ControlClient,
        cause: Exception,
        hint: str,
        steps: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        super().__init__("migrate", device=side.path, why=str(cause) or type(cause).__name__, hint=hint)
        self.side = side.path
        self.kind = getattr(cause, "kind", "")
        self.steps = steps or {}


def move(
    source: ControlClient,
    destination: ControlClient,
    *,
    progress: Callable[[int], None] | None = None,
    accept: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make ``source`` save into ``destination``; returns both answers. The source's device stays suspended, for good.

    If that fails, or this process ends before it is done, the source's device does again what it did before.
    ``progress`` is called with the number of bytes of device state sent so far; ``accept``: what may be lost (`Loss`).
    Raises `UsageError` if both are the same, and `MoveFailed` for the side that caused it.
    """
    if _are_the_same(source.path, destination.path):
        why = f"{source.path} and {destination.path} are the same socket"
        raise UsageError("migrate", why=why, hint="name another one as the destination")
    reader, writer = os.pipe2(os.O_CLOEXEC)
    there: list[Exception] = []
    here: list[VdpaBridgeError] = []
    saved: dict[str, Any] = {}
    loaded: dict[str, Any] = {}

    def load_there() -> None:
        try:
            loaded.update(destination.ask("load", reader, accept=list(accept), moving=True))
        except Exception as error:  # noqa: BLE001  # it is raised below, in the caller's thread
            there.append(error)
        finally:
            os.close(reader)

    thread = threading.Thread(target=load_there)
    thread.start()
    try:
        try:
            saved.update(source.ask("save", writer, stay="connection", progress=progress, accept=list(accept)))
        except VdpaBridgeError as error:
            here.append(error)
        finally:
            os.close(writer)
        thread.join()
    except BaseException as interruption:
        # both processes cancel what they do for a client that has left
        source.leave()
        destination.leave()
        interruption.add_note(f"nothing was moved; {source.path} does again what it did before")
        thread.join()
        if loaded:
            interruption.add_note(f"{destination.path} has the state, and does not start")
        raise
    if here or there:
        # a destination that refuses stops reading, which the source sees as a broken pipe
        broken = bool(here) and os.strerror(errno.EPIPE) in here[0].why
        causes = (there or here) if broken else (here or there)
        steps = {"source": _steps(saved, here), "destination": _steps(loaded, there)}
        side = source if causes is here else destination
        hint = _give_back(source)
        if loaded:
            hint += f"; {destination.path} has the state, and does not start: move to it again, or end its process"
        raise MoveFailed(side, causes[0], hint, steps) from causes[0]
    anyway = f"start the destination by 'vdpabridge resume --force {destination.path}'"
    _say(
        source,
        "moved",
        f"it is not known whether it stays suspended. If 'vdpabridge status {source.path}' says \"moved\", or its "
        f"process has ended and no other follows, {anyway}",
    )
    _say(
        destination,
        "arrived",
        f"{source.path} stays suspended. If 'vdpabridge status {destination.path}' says that its state came from "
        f"another device, {anyway}; if not, that state is gone, and 'vdpabridge resume --force {source.path}' goes "
        "back to it",
    )
    return saved, loaded


def _say(side: ControlClient, what: str, hint: str) -> None:
    """Tell ``side`` of the move. ``hint`` is what to do if that fails: it may have heard it."""
    try:
        side.ask(what)
    except VdpaBridgeError as error:
        raise MoveFailed(side, error, hint) from error
    except BaseException as interruption:
        interruption.add_note(hint)
        raise


def _steps(result: Mapping[str, Any], errors: Sequence[Exception]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = result.get("steps") or getattr(errors[0] if errors else None, "steps", [])
    return steps


def _are_the_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        # one of the two files is gone, but its process is still connected
        return path == other


def _give_back(source: ControlClient) -> str:
    """Have the source's device do again what it did before; what it does now, in words."""
    try:
        return f"{source.path} is {source.ask('release')['state']}; nothing was moved"
    except ControlError as error:
        hint = "'vdpabridge resume' until it is not"
        return f"nothing was moved; {source.path} may be suspended still ({error.why}): {hint}"
    except VdpaBridgeError:
        # if it has lost us already, it does so without being told to
        why = f"{source.path} does not answer: if it still runs, it is as before when this process ends"
        return f"nothing was moved; {why}"
