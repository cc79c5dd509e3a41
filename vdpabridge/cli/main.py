"""Parse the command line, run one command, turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__

__all__ = ["main"]

#: Subcommand -> (module beside this one, function): imported when it is run.
Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``argv``, by default the process's own arguments. Returns an exit code of `exit_codes.TABLE`."""
    words = _parser().parse_args(argv)
    try:
        from . import commands

        run: Command = getattr(commands, words.run)
        run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has left ('vdpabridge list | head'); without this Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("vdpabridge: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from ..errors import VdpaBridgeError
        from .exit_codes import exit_code

        if not isinstance(error, VdpaBridgeError):
            raise
        _report(error, words.json)
        return exit_code(error)
    return 0


def _report(error: Exception, as_json: bool) -> None:
    if not as_json:
        print(f"vdpabridge: {error}", file=sys.stderr)
        return
    import json

    facts = {name: getattr(error, name, None) for name in ("device", "what", "why", "hint", "errno")}
    print(json.dumps({"error": {name: fact for name, fact in facts.items() if fact}}), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from .exit_codes import TABLE

    codes = ", ".join(f"{code} {meaning}" for code, meaning in TABLE.items())
    parser = argparse.ArgumentParser(
        prog="vdpabridge",
        description="virtio devices behind vhost-vdpa and vhost-user: one device-state interface",
        epilog=f"exit codes: {codes}",
    )
    parser.add_argument("-V", "--version", action="version", version=f"vdpabridge {__version__}")
    parser.add_argument(
        "-j", "--json", action="store_true", help="print JSON, in the shape of iproute2's vdpa; errors too"
    )
    parser.add_argument("-p", "--pretty", action="store_true", help="with --json: indent it")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=name.replace("-", "_"))
        # also behind the command, as people type it; SUPPRESS keeps what was said before it
        sub.add_argument("-j", "--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        sub.add_argument("-p", "--pretty", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return sub

    command("list", "list the devices on the vDPA bus: name, driver, node (fast: asks sysfs only)")
    show = command("show", "show devices in full, or the parents that can make devices; disturbs none of them")
    show.add_argument("device", nargs="?", help="a device's name or node (default: all)")
    show.add_argument("--mgmtdev", action="store_true", help="show the management devices instead")
    add = command("add", "make a device")
    add.add_argument("device", help="its name")
    add.add_argument(
        "--mgmtdev", required=True, metavar="PARENT", help="BUS/NAME or NAME, as 'show --mgmtdev' prints it"
    )
    add.add_argument("--driver", metavar="DRIVER", help="bind it to vhost_vdpa or virtio_vdpa afterwards")
    add.add_argument("--mac", metavar="ADDRESS", help="net: its address")
    add.add_argument("--mtu", type=int, metavar="BYTES", help="net: its MTU")
    delete = command("del", "delete a device; refused while a process has its node open")
    delete.set_defaults(run="delete")
    delete.add_argument("device", help="its name or node")
    bind = command("bind", "hand a device to another driver; refused while a process has its node open")
    bind.add_argument("device", help="its name or node")
    bind.add_argument("driver", help="vhost_vdpa (a process uses it) or virtio_vdpa (this kernel does)")
    for sub in (delete, bind):
        text = "do it although a process has the node open: blocks all vDPA commands on this machine until it lets go"
        sub.add_argument("--force", action="store_true", help=text)
    rules = command("udev-rules", "print the udev rules for vhost-vdpa nodes, or their helper")
    rules.add_argument("--helper", action="store_true", help="print the helper that the rules run")
    return parser
