"""Moves state from one process that owns a device to another, through a pipe between the two."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import UsageError, VdpaBridgeError
from .client import ControlClient, ControlError

__all__ = ["MoveFailed", "move"]

#: A move has a name of twice as many characters. It is told apart from the others of its two devices.
_NAME_BYTES = 4


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
    """Make ``source`` save into ``destination``; returns both answers, and in the first the name of the ``move``. The
    source's device stays suspended, for good.

    If that fails, or this process ends before it is done, the source's device does again what it did before.
    ``progress`` is called with the number of bytes of device state sent so far; ``accept``: what may be lost (`Loss`).
    Raises `UsageError` if both are the same, and `MoveFailed` for the side that caused it.
    """
    if _are_the_same(source.path, destination.path):
        why = f"{source.path} and {destination.path} are the same socket"
        raise UsageError("migrate", why=why, hint="name another one as the destination")
    name = os.urandom(_NAME_BYTES).hex()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    there: list[Exception] = []
    here: list[VdpaBridgeError] = []
    saved: dict[str, Any] = {}
    loaded: dict[str, Any] = {}

    def load_there() -> None:
        try:
            loaded.update(destination.ask("load", reader, accept=list(accept), move=name))
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
        interruption.add_note(f"if {destination.path} has got the state, it does not start")
        raise
    if here or there:
        # a destination that refuses stops reading, which the source sees as a broken pipe
        broken = bool(here) and os.strerror(errno.EPIPE) in here[0].why
        causes = (there or here) if broken else (here or there)
        steps = {"source": _steps(saved, here), "destination": _steps(loaded, there)}
        side = source if causes is here else destination
        hint = _give_back(source, destination, name if loaded else "")
        raise MoveFailed(side, causes[0], hint, steps) from causes[0]
    loaded.update(_hand_over(source, destination, name))
    return saved | {"move": name}, loaded


def _hand_over(source: ControlClient, destination: ControlClient, name: str) -> dict[str, Any]:
    """Both have the state: from now on it is the destination's. Returns its answer."""
    with _hint_if_unanswered(source, _IF_MOVED.format(source.path, destination.path, name)):
        try:
            source.ask("moved", move=name)
        except ControlError as error:
            # refused: what it has given away is only a copy
            raise MoveFailed(source, error, _give_back(source, destination, name)) from error
    with _hint_if_unanswered(destination, _IF_ARRIVED.format(source.path, destination.path, name)):
        answer: dict[str, Any] = destination.ask("arrived", move=name)
    return answer


_HAS_IT = "{0} has the state, and does not start: end its process; or move to it again, if no VMM was there"
#: What to do if `moved` had no answer. It is not done for a mover that has left. Whoever follows this and the next
#: never has two devices that run: each step is tied to this move, and is refused if the move's state is not there.
_IF_MOVED = (
    "it is not known whether {0} stays suspended. 'vdpabridge status {0}' says what became of move {2}. If it says "
    "\"moved\", 'vdpabridge resume --move {2} {1}' lets {1} start; if the process that saved says nothing of it, "
    "nothing was moved. If that process has ended, {1} alone has the state: let it start by the same command, unless a "
    "guest works with a new process at {0}"
)
#: What to do if the destination has the state, and the source does not answer when it is to go back.
_IF_ENDED = (
    "{0} does not answer. If its process still runs, it is as before when this process ends, and nothing was moved: "
    "end the process of {1}, or move to it again. If the process of {0} has ended, {1} alone has the state: "
    "'vdpabridge resume --move {2} {1}' lets {1} start, unless a guest works with a new process at {0}"
)
#: The same for `arrived`. That the destination does not say that it has the state does not prove that it has not.
_IF_ARRIVED = (
    "{0} stays suspended. 'vdpabridge resume --move {2} {1}' lets {1} start; if it is refused, its error says what "
    "became of the state. If {1} does not answer, and a guest may have worked with it since, {0} must not run. If none "
    "has, end the process of {1} for good before 'vdpabridge resume --force {0}' goes back to what {0} has"
)


@contextmanager
def _hint_if_unanswered(side: ControlClient, hint: str) -> Iterator[None]:
    """The body tells ``side`` of the move. If that fails, ``side`` may have heard it, and ``hint`` says what to do."""
    try:
        yield
    except MoveFailed:
        raise
    except VdpaBridgeError as error:
        own = f"{error.hint}; " if error.hint else ""
        raise MoveFailed(side, error, own + hint) from error
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


def _give_back(source: ControlClient, destination: ControlClient, name: str) -> str:
    """Have the source's device do again what it did before; what it does now, and what to do, in words.

    ``name`` is the move's, if the destination has the state; else empty.
    """
    try:
        now = f"{source.path} is {source.ask('release')['state']}; nothing was moved"
    except ControlError as error:
        hint = "'vdpabridge resume' until it is not"
        now = f"nothing was moved; {source.path} may be suspended still ({error.why}): {hint}"
    except VdpaBridgeError:
        if name:
            return _IF_ENDED.format(source.path, destination.path, name)
        # if it has lost us already, it does so without being told to
        why = f"{source.path} does not answer: if it still runs, it is as before when this process ends"
        return f"nothing was moved; {why}"
    return f"{now}; {_HAS_IT.format(destination.path)}" if name else now
