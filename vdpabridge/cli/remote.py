"""The commands that ask the process that owns a device: ``status``, ``suspend``, ``resume``, ``save`` and others."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from ..control.client import ControlClient, ControlError
from ..control.moving import MoveFailed, move
from ..errors import UsageError, VdpaBridgeError
from ..linux.deadline import Deadline
from ..linux.files import replacing
from ..state.image.opening import open_image
from ..state.report import Step
from ..state.transfer.channel import Limits
from .output import forget_output
from .progress import ProgressLine
from .readable import READABLE, bytes_text
from .timeline_picture import draw

__all__ = ["load", "migrate", "resume", "save", "statistics", "status", "suspend"]


def status(arguments: argparse.Namespace) -> None:
    """``vdpabridge status``."""
    _show(arguments, _ask(arguments, "status"))


def statistics(arguments: argparse.Namespace) -> None:
    """``vdpabridge statistics``."""
    _show(arguments, _ask(arguments, "statistics"))


def suspend(arguments: argparse.Namespace) -> None:
    """``vdpabridge suspend``."""
    _show(arguments, _ask(arguments, "suspend"))


def resume(arguments: argparse.Namespace) -> None:
    """``vdpabridge resume``."""
    which = {"force": True} if arguments.force else {"move": arguments.move} if arguments.move else {}
    _show(arguments, _ask(arguments, "resume", **which))


def save(arguments: argparse.Namespace) -> None:
    """``vdpabridge save``: to a file, or to standard output.

    Until the image is safe the device stays suspended only for as long as this process lives.
    """
    with ControlClient(arguments.control, timeout_s=arguments.timeout) as client:
        if arguments.image == "-":
            if os.isatty(1):
                raise UsageError("save", why="an image is not for a terminal", hint="name a file, or redirect it")
            result = _save(client, 1, arguments)
            # the image has standard output, and is whole already, whoever listens here
            with suppress(OSError):
                print(json.dumps(result), file=sys.stderr, flush=True)
            return
        with replacing(arguments.image) as fd:
            result = _save(client, fd, arguments)
        if arguments.stay:
            try:
                result |= client.ask("suspend")
            except VdpaBridgeError as error:
                error.hint = f"{arguments.image} is written; the device resumes when this process has ended"
                raise
    try:
        _tell(arguments, result)
    except VdpaBridgeError as error:
        error.hint = f"{arguments.image} is written" + ("; the device stays suspended" if arguments.stay else "")
        raise


def _save(client: ControlClient, fd: int, arguments: argparse.Namespace) -> dict[str, Any]:
    stay = "connection" if arguments.stay else False
    with ProgressLine("save") as progress:
        saved: dict[str, Any] = client.ask("save", fd, stay=stay, progress=progress, accept=arguments.accept)
    if arguments.stay and arguments.image == "-":
        saved |= client.ask("suspend")
    return saved


def load(arguments: argparse.Namespace) -> None:
    """``vdpabridge load``: from a file, or from standard input."""
    fd = open_image(arguments.image, Limits(Deadline(arguments.timeout)))
    try:
        with ControlClient(arguments.control, timeout_s=arguments.timeout) as client:
            with ProgressLine("load") as progress:
                result = client.ask("load", fd, progress=progress, accept=arguments.accept)
            _show(arguments, result)
    except ControlError as error:
        error.device = f"{arguments.image} into {error.device}"
        raise
    finally:
        os.close(fd)


def migrate(arguments: argparse.Namespace) -> None:
    """``vdpabridge migrate``: from one process into another. If that fails, the first device is as it was before."""
    saved: dict[str, Any] = {}
    try:
        with (
            ControlClient(arguments.control, timeout_s=arguments.timeout) as source,
            ControlClient(arguments.destination, timeout_s=arguments.timeout) as destination,
            # before anything is moved: a path that cannot be written is no reason to stop then
            replacing(arguments.report) if arguments.report else nullcontext() as report,
        ):
            with ProgressLine("migrate") as progress:
                saved, loaded = move(source, destination, progress=progress, accept=arguments.accept)
            if report is not None:
                lanes = {"source": saved["steps"], "destination": loaded["steps"]}
                _draw(report, arguments, f"{bytes_text(saved['state_bytes'])} of state", lanes)
        _tell(arguments, saved | {"running": _running(loaded)})
    except (VdpaBridgeError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, MoveFailed):
            _draw_failure(error, arguments)
        if not saved:
            raise
        hint = "the state was moved all the same: start the destination by its front-end"
        if isinstance(error, KeyboardInterrupt):
            error.add_note(hint)
            raise
        if isinstance(error, VdpaBridgeError):
            error.hint = hint
            raise
        why = os.strerror(error.errno or 0)
        raise VdpaBridgeError("write the report", device=arguments.report, why=why, hint=hint) from error


def _running(loaded: Mapping[str, Any]) -> str:
    """What runs after a move, in words; ``loaded`` is what the destination has answered."""
    if loaded["state"] == "running":
        return str(loaded["device"])
    who = "'vdpabridge resume' lets the destination run" if loaded.get("held") else "a front-end starts the destination"
    return f"nothing, until {who}"


def _draw_failure(error: MoveFailed, arguments: argparse.Namespace) -> None:
    """Draw what was done, if that is known; what goes wrong with that is not what the user has to hear of."""
    if arguments.report and any(error.steps.values()):
        with suppress(VdpaBridgeError, OSError), replacing(arguments.report) as fd:
            _draw(fd, arguments, "failed", error.steps)


def _draw(fd: int, arguments: argparse.Namespace, what: str, lanes: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    drawn = {name: [Step(**step) for step in steps] for name, steps in lanes.items()}
    picture = draw(f"{arguments.control} to {arguments.destination}: {what}", drawn)
    with open(fd, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as file:
        file.write(picture)


def _ask(arguments: argparse.Namespace, method: str, **params: Any) -> Any:
    with ControlClient(arguments.control, timeout_s=arguments.timeout) as client:
        return client.ask(method, **params)


def _tell(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """As `_show`, of something that was done, and stays done where this cannot be told."""
    try:
        _show(arguments, result)
        sys.stdout.flush()
    except OSError as error:
        forget_output()
        raise VdpaBridgeError(arguments.command, device="standard output", why=os.strerror(error.errno or 0)) from error


def _show(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(result, indent=4 if arguments.pretty else None))
        return
    for line in READABLE[arguments.command](result):
        print(line)
