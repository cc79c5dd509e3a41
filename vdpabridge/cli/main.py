"""Parse the command line, run one command, turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import VdpaBridgeError
from .command_table import COMMANDS
from .exit_codes import DONE, INTERRUPTED, REFUSED, TABLE, exit_code
from .output import forget_output
from .usage import Parser

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``argv``, by default the process's own arguments. Returns an exit code of `exit_codes.TABLE`."""
    try:
        _open_standard_descriptors()
        return _run(_parse(sys.argv[1:] if argv is None else list(argv)))
    except KeyboardInterrupt as interruption:
        print(": ".join(("vdpabridge: interrupted", *getattr(interruption, "__notes__", ()))), file=sys.stderr)
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    """Do what ``arguments`` say. Returns an exit code of `exit_codes.TABLE`."""
    try:
        module, function = arguments.run.split(":")
        code: int | None = getattr(importlib.import_module(f".{module}", __package__), function)(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has left ('vdpabridge list | head')
        forget_output()
        return REFUSED
    except VdpaBridgeError as error:
        _report(error, arguments.json)
        return exit_code(error)
    except OSError as error:
        # standard output's, which is the only one that nobody else explains
        forget_output()
        _report(VdpaBridgeError(arguments.command, why=str(error)), arguments.json)
        return REFUSED
    except Exception as error:
        if os.environ.get("VDPABRIDGE_TRACEBACK"):
            raise
        why, hint = f"{type(error).__name__}: {error}", "a mistake in vdpabridge: VDPABRIDGE_TRACEBACK=1 shows where"
        _report(VdpaBridgeError(arguments.command, why=why, hint=hint), arguments.json)
        return REFUSED
    return code or DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The words in ``arguments``. Raises SystemExit where help was printed, or what is wrong with them."""
    try:
        try:
            _answer_iproute2(arguments)
            return _parser(arguments).parse_args(arguments)
        except SystemExit:
            sys.stdout.flush()
            raise
    except OSError as error:
        forget_output()
        print(f"vdpabridge: standard output: {os.strerror(error.errno or 0)}", file=sys.stderr)
        raise SystemExit(REFUSED) from None


def _answer_iproute2(arguments: Sequence[str]) -> None:
    """Say what a command of iproute2's vdpa is called here."""
    words = [word for word in arguments if not word.startswith("-")]
    if words[:1] in (["dev"], ["mgmtdev"]):
        instead = {"mgmtdev": "show --mgmtdev"}.get(words[0]) or " ".join(words[1:] or ["list"])
        parser = _parser([])
        parser.as_json = _wants_json(arguments)
        parser.error(f"there is no object {words[0]!r} here, as iproute2's vdpa has: try 'vdpabridge {instead}'")


def _wants_json(arguments: Sequence[str]) -> bool:
    return any(word == "--json" or (word[:1] == "-" != word[1:2] and "j" in word) for word in arguments)


def _open_standard_descriptors() -> None:
    """Put something in the place of standard descriptors that are closed.

    A file or socket that is opened later would take their numbers, and get what is said to the user. To read the one,
    and to write the other two, fails.
    """
    streams = (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
    for fd, (name, flags, mode) in enumerate(streams):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # for as long as we live


def _report(error: VdpaBridgeError, as_json: bool) -> None:
    if not as_json:
        print(f"vdpabridge: {error}", file=sys.stderr)
        return
    import json

    facts = {name: getattr(error, name, None) for name in ("device", "what", "why", "hint", "errno")}
    print(json.dumps({"error": {name: fact for name, fact in facts.items() if fact}}), file=sys.stderr)


def _command_of(arguments: Sequence[str]) -> str | None:
    """The command in ``arguments``, where it is clear: then only its parser is made, which halves the time."""
    for word in arguments:
        if word in COMMANDS:
            return word
        if word not in ("-j", "--json", "-p", "--pretty"):
            break
    return None


def _formatter(prog: str) -> argparse.HelpFormatter:
    """argparse's own would import shutil, and with it every compressor there is, to ask for the width."""
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (ValueError, OSError):
        columns = 80
    return argparse.HelpFormatter(prog, width=columns - 2)


def parser() -> argparse.ArgumentParser:
    """The whole parser, for what is made of it: man pages, completion."""
    return _build(None, with_arguments=True, as_json=False)


def _parser(arguments: Sequence[str]) -> Parser:
    """A parser for ``arguments``: of the commands, only what they can need is made."""
    with_arguments = any(word in COMMANDS for word in arguments)
    return _build(_command_of(arguments), with_arguments=with_arguments, as_json=_wants_json(arguments))


def _build(only: str | None, *, with_arguments: bool, as_json: bool) -> Parser:
    """A parser of the command ``only``, or of all."""
    codes = ", ".join(f"{code} {meaning}" for code, meaning in TABLE.items())
    parser = Parser(
        prog="vdpabridge",
        description="virtio devices behind vhost-vdpa and vhost-user: one device-state interface",
        epilog=f"exit codes: {codes}",
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.as_json = as_json
    parser.add_argument("-V", "--version", action="version", version=f"vdpabridge {__version__}")
    text = "print JSON, in the shape of iproute2's vdpa; errors too"
    parser.add_argument("-j", "--json", action="store_true", help=text)
    parser.add_argument("-p", "--pretty", action="store_true", help="with --json: indent it")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (function, text, add_arguments) in COMMANDS.items():
        if only not in (None, name):
            continue
        sub = commands.add_parser(name, help=text, description=text, formatter_class=_formatter, allow_abbrev=False)
        sub.set_defaults(run=function, command=name)
        sub.as_json = parser.as_json
        # also behind the command, as people type it; SUPPRESS keeps what was said before it
        sub.add_argument("-j", "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, errors too")
        sub.add_argument(
            "-p", "--pretty", action="store_true", default=argparse.SUPPRESS, help="with --json: indent it"
        )
        if with_arguments:
            add_arguments(sub)
    return parser
