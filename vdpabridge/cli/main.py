"""Parse the command line, run one command, turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import VdpaBridgeError
from .exit_codes import DONE, INTERRUPTED, REFUSED, TABLE, exit_code
from .output import forget_output
from .usage import Parser, descriptor, path, seconds

__all__ = ["main"]


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
            return _parser(arguments).parse_args(arguments)
        except SystemExit:
            sys.stdout.flush()
            raise
    except OSError as error:
        forget_output()
        print(f"vdpabridge: standard output: {os.strerror(error.errno or 0)}", file=sys.stderr)
        raise SystemExit(REFUSED) from None


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


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", nargs="?", help="a device's name or node (default: all)")
    parser.add_argument("--mgmtdev", action="store_true", help="show the management devices instead")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="its name")
    text = "BUS/NAME or NAME, as 'show --mgmtdev' prints it"
    parser.add_argument("--mgmtdev", required=True, metavar="PARENT", help=text)
    parser.add_argument("--driver", choices=("vhost_vdpa", "virtio_vdpa"), help="what to bind it to afterwards")
    parser.add_argument("--mac", metavar="ADDRESS", help="net: its address")
    parser.add_argument("--mtu", type=int, metavar="BYTES", help="net: its MTU")


def _delete(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="its name or node")
    _force(parser)


def _bind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="its name or node")
    parser.add_argument("driver", help="vhost_vdpa (a process uses it) or virtio_vdpa (this kernel does)")
    _force(parser)


def _force(parser: argparse.ArgumentParser) -> None:
    text = (
        "do it although somebody uses the device. A process that has the node open blocks all vDPA commands on this "
        "machine until it lets go; a mounted disk or a network interface is taken away at once"
    )
    parser.add_argument("--force", action="store_true", help=text)


def _udev_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--helper", action="store_true", help="print the helper that the rules run")


def _serve(parser: argparse.ArgumentParser) -> None:
    from ..drivers.names import DEVICE_HELP
    from .log import LEVELS

    parser.add_argument("device", metavar="DEVICE", help=DEVICE_HELP)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", type=path, metavar="PATH", help="listen here; the file is removed at the end")
    where.add_argument(
        "--fd", type=descriptor, metavar="N", help="a socket that is open: one that listens, or is connected"
    )
    text = "print what the back-end can do, as JSON, and do nothing else"
    parser.add_argument("--print-capabilities", action="store_true", help=text)
    parser.add_argument("--once", action="store_true", help="end when the first front-end has left")
    text = "a socket for 'vdpabridge status', 'save' and others to ask this process; for this user only"
    parser.add_argument("--control", type=path, metavar="PATH", help=text)
    text = "begin with the device's state in this image; - for standard input"
    parser.add_argument("--restore", type=path, metavar="IMAGE", help=text)
    _accept(parser)
    text = "print every message, and every request to the device, on standard error"
    parser.add_argument("--trace", action="store_true", help=text)
    text = "how urgent what is printed on standard error must be: error, warning, info (the default) or debug"
    parser.add_argument("--log-level", choices=LEVELS, default="info", metavar="LEVEL", help=text)
    text = "bounds every wait for the device or for a front-end in the middle of a message (default: 30)"
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", default=30.0, help=text)


def _control(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("control", type=path, metavar="CONTROL", help="the control socket of 'vdpabridge serve'")
    text = "how long to wait for an answer (default: 300)"
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", default=300.0, help=text)


def _save(parser: argparse.ArgumentParser) -> None:
    _control(parser)
    parser.add_argument("image", type=path, metavar="IMAGE", help="where to; - for standard output")
    parser.add_argument("--stay", action="store_true", help="leave the device suspended afterwards")
    _accept(parser)


def _load(parser: argparse.ArgumentParser) -> None:
    _control(parser)
    parser.add_argument("image", type=path, metavar="IMAGE", help="where from; - for standard input")
    _accept(parser)


def _migrate(parser: argparse.ArgumentParser) -> None:
    _control(parser)
    text = "the control socket of the other 'vdpabridge serve'"
    parser.add_argument("destination", type=path, metavar="DESTINATION", help=text)
    parser.add_argument("--report", type=path, metavar="FILE.svg", help="draw what was done, to scale")
    _accept(parser)


def _resume(parser: argparse.ArgumentParser) -> None:
    _control(parser)
    text = "also resume a device whose state was moved to another. The other must not run, now or later"
    parser.add_argument("--force", action="store_true", help=text)


def _accept(parser: argparse.ArgumentParser) -> None:
    text = (
        "do it although this is lost: device-state (what the device knows of its guest) or control-queue (what the "
        "guest has set in a network card). For those who can set it again. May be given twice"
    )
    choices = ("device-state", "control-queue")
    parser.add_argument("--accept", action="append", default=[], choices=choices, metavar="LOSS", help=text)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=path, metavar="IMAGE", help="a state image; - for standard input")
    parser.add_argument("--diff", action="store_true", help="show what differs between two images")


def _nothing(_parser: argparse.ArgumentParser) -> None: ...


#: Command -> (module of this package:function, what it does, what adds its arguments).
_COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "list": (
        "commands:list",
        "list the devices on the vDPA bus: name, driver, node. Fast: it asks sysfs only",
        _nothing,
    ),
    "show": ("commands:show", "show devices in full, or with --mgmtdev their parents. Disturbs no device", _show),
    "add": ("commands:add", "make a device", _add),
    "del": ("commands:delete", "delete a device. Refused while somebody uses it", _delete),
    "bind": ("commands:bind", "give a device to another driver. Refused while somebody uses it", _bind),
    "serve": ("serve:serve", "be the vhost-user back-end of a device, for QEMU and other front-ends", _serve),
    "demo": ("demo:demo", "show how a device's state goes from one process into another. Needs no root", _nothing),
    "status": ("remote:status", "show the device of a 'serve --control', and what it does", _control),
    "statistics": ("remote:statistics", "show what a 'serve --control' has done since it started", _control),
    "suspend": ("remote:suspend", "suspend the device of a 'serve --control', until 'resume'", _control),
    "resume": ("remote:resume", "resume the device that 'suspend' has suspended", _resume),
    "save": (
        "remote:save",
        "save the device of a 'serve --control' into an image. The device resumes afterwards",
        _save,
    ),
    "load": ("remote:load", "give the device of a 'serve --control' the state in an image", _load),
    "migrate": ("remote:migrate", "move the state of one 'serve --control' into another", _migrate),
    "inspect": ("inspect:inspect", "show what is in a state image: device, features, queues, state", _inspect),
    "udev-rules": (
        "commands:udev_rules",
        "print the udev rules for vhost-vdpa nodes, or the helper that they run",
        _udev_rules,
    ),
}


def _command_of(arguments: Sequence[str]) -> str | None:
    """The command in ``arguments``, where it is clear: then only its parser is made, which halves the time."""
    for word in arguments:
        if word in _COMMANDS:
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


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for ``arguments``: of the commands, only what they can need is made."""
    only = _command_of(arguments)
    whole = any(word in _COMMANDS for word in arguments)
    codes = ", ".join(f"{code} {meaning}" for code, meaning in TABLE.items())
    parser = Parser(
        prog="vdpabridge",
        description="virtio devices behind vhost-vdpa and vhost-user: one device-state interface",
        epilog=f"exit codes: {codes}",
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.as_json = any(word == "--json" or (word[:1] == "-" != word[1:2] and "j" in word) for word in arguments)
    parser.add_argument("-V", "--version", action="version", version=f"vdpabridge {__version__}")
    text = "print JSON, in the shape of iproute2's vdpa; errors too"
    parser.add_argument("-j", "--json", action="store_true", help=text)
    parser.add_argument("-p", "--pretty", action="store_true", help="with --json: indent it")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (function, text, add_arguments) in _COMMANDS.items():
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
        if whole:
            add_arguments(sub)
    return parser
