"""The commands that ask the process that owns a device: ``status``, ``suspend``, ``resume``, ``save`` and others."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ..control.client import ControlClient
from ..control.moving import move
from ..errors import VdpaBridgeError
from ..state.files import replacing
from ..state.report import Step
from ..state.timeline import draw
from .output import print_records
from .progress import ProgressLine

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
    _show(words, _ask(words, "resume"))


def save(words: argparse.Namespace) -> None:
    """``vdpabridge save``: to a file, or to standard output."""
    with ControlClient(words.control, timeout_s=words.timeout) as client, ProgressLine("save") as progress:
        if words.image == "-":
            result = client.ask("save", sys.stdout.fileno(), stay=words.stay, progress=progress)
            print(json.dumps(result), file=sys.stderr)
            return
        with replacing(words.image) as fd:
            result = client.ask("save", fd, stay=words.stay, progress=progress)
    _show(words, result)


def load(words: argparse.Namespace) -> None:
    """``vdpabridge load``: from a file, or from standard input."""
    try:
        fd = os.dup(sys.stdin.fileno()) if words.image == "-" else os.open(words.image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise VdpaBridgeError("load", device=words.image, why=os.strerror(error.errno or 0)) from error
    try:
        with ControlClient(words.control, timeout_s=words.timeout) as client:
            with ProgressLine("load") as progress:
                result = client.ask("load", fd, progress=progress)
            _show(words, result)
    finally:
        os.close(fd)


def migrate(words: argparse.Namespace) -> None:
    """``vdpabridge migrate``: from one process into another; where that fails, the first goes on."""
    with (
        ControlClient(words.control, timeout_s=words.timeout) as source,
        ControlClient(words.destination, timeout_s=words.timeout) as destination,
    ):
        with ProgressLine("migrate") as progress:
            saved, loaded = move(source, destination, progress=progress)
        if words.report:
            _draw(words, saved, loaded)
        _show(words, saved | {"running": "nothing: start the destination by its front-end"})


def _draw(words: argparse.Namespace, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    lanes = {
        name: [Step(**step) for step in facts["steps"]] for name, facts in (("source", saved), ("destination", loaded))
    }
    picture = draw(f"{words.control} to {words.destination}: {saved['state_bytes']} bytes of state", lanes)
    with replacing(words.report) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
        file.write(picture)


def _ask(words: argparse.Namespace, method: str) -> Any:
    with ControlClient(words.control, timeout_s=words.timeout) as client:
        return client.ask(method)


def _show(words: argparse.Namespace, result: dict[str, Any]) -> None:
    if words.json:
        print(json.dumps(result, indent=4 if words.pretty else None))
        return
    facts = {name: value for name, value in result.items() if not isinstance(value, dict) and name != "steps"}
    print_records({str(result.get("device", words.control)): facts})
    for index, queue in result.get("queues", {}).items():
        print_records({f"queue {index}": queue})
    print_records(result.get("procedures", {}))
