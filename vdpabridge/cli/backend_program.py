"""``vdpabridge-vhost-user-blk``: a disk as a vhost-user back-end, called as management software calls one.

Source: docs/interop/vhost-user.rst, "Backend program conventions", "vhost-user-blk"; docs/interop/vhost-user.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from .main import main as command
from .usage import Parser, descriptor, path

__all__ = ["main"]

_CAPABILITIES = {"type": "block", "features": ["blk-file", "read-only"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the disk in ``--blk-file``; the same as ``vdpabridge serve sim:blk,file=…``."""
    parser = Parser(prog="vdpabridge-vhost-user-blk", description="serve a file as a vhost-user disk")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", type=path, metavar="PATH", help="listen here")
    where.add_argument(
        "--fd", type=descriptor, metavar="N", help="a socket that is open: one that listens, or is connected"
    )
    parser.add_argument("--print-capabilities", action="store_true", help="print them, as JSON, and do nothing else")
    parser.add_argument("--blk-file", type=path, metavar="PATH", help="the disk")
    parser.add_argument("--read-only", action="store_true", help="let nobody write it")
    arguments = parser.parse_args(argv)
    if arguments.print_capabilities:
        print(json.dumps(_CAPABILITIES))
        return 0
    if arguments.blk_file is None:
        parser.error("--blk-file is needed")
    if arguments.socket_path is None and arguments.fd is None:
        parser.error("--socket-path or --fd is needed")
    if "," in arguments.blk_file:
        parser.error("a file's name with a comma cannot be served")
    device = f"sim:blk,file={arguments.blk_file}" + (",read-only" if arguments.read_only else "")
    place = ["--fd", str(arguments.fd)] if arguments.fd is not None else ["--socket-path", arguments.socket_path]
    return command(["serve", device, *place])
