"""The commands that ask the process that owns a device: ``status``, ``suspend``, ``resume``, ``save`` and others."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext, suppress
from typing import Any

from ..control.client import ControlClient, ControlError
from ..control.moving import move
from ..errors import UsageError, VdpaBridgeError
from ..linux.files import replacing
from ..state.image.opening import open_image
from ..state.report import Step
from .output import forget_output, print_records
from .progress import ProgressLine
from .timeline_picture import draw

__all__ = ["load", "migrate", "resume", "save", "statistics", "status", "suspend"]


def status(words: argparse.Namespace) -> None:
    """``vdpabridge status``."""
    _show(words, _ask(words, "status"))


def statistics(words: argparse.Namespace) -> None:
    """``vdpabridge statistics``."""
    _show(words, _ask(words, "statistics"))


def suspend(words: argparse.Namespace) -> None:
    """``vdpabridge suspend``."""
    _show(words, _ask(words, "suspend"))


def resume(words: argparse.Namespace) -> None:
    """``vdpabridge resume``."""
    _show(words, _ask(words, "resume", force=words.force))


def save(words: argparse.Namespace) -> None:
    """``vdpabridge save``: to a file, or to standard output.

    Until the image is safe the device stays suspended only for as long as this process lives.
    """
    with ControlClient(words.control, timeout_s=words.timeout) as client:
        if words.image == "-":
            if os.isatty(1):
                raise UsageError("save", why="an image is not for a terminal", hint="name a file, or redirect it")
            result = _save(client, 1, words)
            # the image has standard output, and is whole already, whoever listens here
            with suppress(OSError):
                print(json.dumps(result), file=sys.stderr, flush=True)
            return
        with replacing(words.image) as fd:
            result = _save(client, fd, words)
        if words.stay:
            try:
                result |= client.ask("suspend")
            except VdpaBridgeError as error:
                error.hint = f"{words.image} is written; the device resumes when this process has ended"
                raise
    try:
        _tell(words, result)
    except VdpaBridgeError as error:
        error.hint = f"{words.image} is written" + ("; the device stays suspended" if words.stay else "")
        raise


def _save(client: ControlClient, fd: int, words: argparse.Namespace) -> dict[str, Any]:
    stay = "connection" if words.stay else False
    with ProgressLine("save") as progress:
        saved: dict[str, Any] = client.ask("save", fd, stay=stay, progress=progress, accept=words.accept)
    if words.stay and words.image == "-":
        saved |= client.ask("suspend")
    return saved


def load(words: argparse.Namespace) -> None:
    """``vdpabridge load``: from a file, or from standard input."""
    fd = open_image(words.image, words.timeout)
    try:
        with ControlClient(words.control, timeout_s=words.timeout) as client:
            with ProgressLine("load") as progress:
                result = client.ask("load", fd, progress=progress, accept=words.accept)
            _show(words, result)
    except ControlError as error:
        error.device = f"{words.image} into {error.device}"
        raise
    finally:
        os.close(fd)


def migrate(words: argparse.Namespace) -> None:
    """``vdpabridge migrate``: from one process into another; where that fails, the first resumes."""
    saved: dict[str, Any] = {}
    try:
        with (
            ControlClient(words.control, timeout_s=words.timeout) as source,
            ControlClient(words.destination, timeout_s=words.timeout) as destination,
            # before anything is moved: a path that cannot be written is no reason to stop then
            replacing(words.report) if words.report else nullcontext() as report,
        ):
            with ProgressLine("migrate") as progress:
                saved, loaded = move(source, destination, progress=progress, accept=words.accept)
            if report is not None:
                _draw(report, words, saved, loaded)
        _tell(words, saved | {"running": "nothing: start the destination by its front-end"})
    except (VdpaBridgeError, OSError, KeyboardInterrupt) as error:
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
        raise VdpaBridgeError("write the report", device=words.report, why=why, hint=hint) from error


def _draw(fd: int, words: argparse.Namespace, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    lanes = {
        name: [Step(**step) for step in facts["steps"]] for name, facts in (("source", saved), ("destination", loaded))
    }
    picture = draw(f"{words.control} to {words.destination}: {saved['state_bytes']} bytes of state", lanes)
    with open(fd, "w", encoding="utf-8", closefd=False) as file:
        file.write(picture)


def _ask(words: argparse.Namespace, method: str, **params: Any) -> Any:
    with ControlClient(words.control, timeout_s=words.timeout) as client:
        return client.ask(method, **params)


def _tell(words: argparse.Namespace, result: dict[str, Any]) -> None:
    """As `_show`, of something that was done, and stays done where this cannot be told."""
    try:
        _show(words, result)
        sys.stdout.flush()
    except OSError as error:
        forget_output()
        raise VdpaBridgeError(words.command, device="standard output", why=os.strerror(error.errno or 0)) from error


def _show(words: argparse.Namespace, result: dict[str, Any]) -> None:
    if words.json:
        print(json.dumps(result, indent=4 if words.pretty else None))
        return
    facts = {name: value for name, value in result.items() if not isinstance(value, dict) and name != "steps"}
    print_records({str(result.get("device", words.control)): facts})
    for index, queue in result.get("queues", {}).items():
        print_records({f"queue {index}": queue})
    print_records(result.get("procedures", {}))
