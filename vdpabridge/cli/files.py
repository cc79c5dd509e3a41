"""The commands that print files for others: udev's rules, systemd's units, descriptors for management software."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from ..errors import UsageError

__all__ = ["DESCRIPTORS", "SERVICE_FILES", "descriptor", "service_file", "udev_rules"]

_FOLDER = Path(__file__).parent / "service"
#: What is asked for -> the file in this package.
SERVICE_FILES = {
    "service": "vdpabridge@.service",
    "socket": "vdpabridge@.socket",
    "sysusers": "vdpabridge.sysusers",
    "tmpfiles": "vdpabridge.tmpfiles",
}
#: Kind -> the program, and what it is. Source: docs/interop/vhost-user.json, VhostUserBackendInfo.
DESCRIPTORS = {
    "blk": ("block", "vdpabridge-vhost-user-blk", "a file as a vhost-user disk, with in-flight tracking and state"),
    "fs": ("fs", "vdpabridge-vhost-user-fs", "a folder by virtiofsd, behind a proxy that can be saved and migrated"),
}


def udev_rules(arguments: argparse.Namespace) -> None:
    """``vdpabridge udev-rules``."""
    from ..bus.udev_files import helper, rules

    name, text = ("helper", helper()) if arguments.helper else ("rules", rules())
    _print(name, text, arguments)


def service_file(arguments: argparse.Namespace) -> None:
    """``vdpabridge service-file``."""
    _print(arguments.file, (_FOLDER / SERVICE_FILES[arguments.file]).read_text(encoding="utf-8"), arguments)


def descriptor(arguments: argparse.Namespace) -> None:
    """``vdpabridge descriptor``: JSON, with or without ``-j``."""
    kind, program, description = DESCRIPTORS[arguments.kind]
    binary = arguments.binary or shutil.which(program)
    if binary is None:
        raise UsageError("descriptor", why=f"{program} is not on the PATH", hint="say where it is: --binary PATH")
    facts = {"description": f"vdpabridge: {description}", "type": kind, "binary": str(Path(binary).absolute())}
    print(json.dumps(facts, indent=2))


def _print(name: str, text: str, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({name: text}))
    else:
        print(text, end="")
