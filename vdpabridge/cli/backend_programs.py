"""Programs that management software (libvirt) starts, one for each kind of device, with the options that it gives.

Source: docs/interop/vhost-user.rst, "Backend program conventions", "vhost-user-blk"; docs/interop/vhost-user.json;
virtiofsd's own options, for the file server.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import VdpaBridgeError
from ..linux.signals import uninterrupted
from .exit_codes import INTERRUPTED, REFUSED
from .main import main as command
from .usage import Parser, descriptor, path

__all__ = ["blk", "blk_parser", "fs", "fs_parser"]

_BLK_CAPABILITIES = {"type": "block", "features": ["blk-file", "read-only"]}
_FS_CAPABILITIES = {"type": "fs", "features": ["migrate-precopy", "separate-options"]}
#: Where distributions put virtiofsd, which is not on the PATH.
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
_START_S, _END_S, _PAUSE_S = 10.0, 5.0, 0.01

#: Signals that end a back-end, beside SIGINT.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


def blk(argv: Sequence[str] | None = None) -> int:
    """``vdpabridge-vhost-user-blk``: serve the disk in ``--blk-file``, as ``vdpabridge serve sim:blk,file=…`` does."""
    parser = blk_parser()
    arguments = parser.parse_args(argv)
    if arguments.print_capabilities:
        print(json.dumps(_BLK_CAPABILITIES))
        return 0
    if arguments.blk_file is None:
        parser.error("--blk-file is needed")
    if "," in arguments.blk_file:
        parser.error("a file's name with a comma cannot be served")
    device = f"sim:blk,file={arguments.blk_file}" + (",read-only" if arguments.read_only else "")
    return command(["serve", device, *_place(parser, arguments.socket_path, arguments.fd)])


def fs(argv: Sequence[str] | None = None) -> int:
    """``vdpabridge-vhost-user-fs``: a virtiofsd for ``--shared-dir``, and before it the proxy that a front-end sees.

    What it does not know it hands to virtiofsd. Its device can be suspended, saved and migrated by ``--control``.
    """
    parser = fs_parser()
    arguments, others = parser.parse_known_args(argv)
    if arguments.print_capabilities:
        print(json.dumps(_FS_CAPABILITIES))
        return 0
    if arguments.shared_dir is None:
        parser.error("--shared-dir is needed")
    program = arguments.virtiofsd or _find_virtiofsd()
    if program is None:
        parser.error("virtiofsd is not installed: --virtiofsd says where it is")
    place = _place(parser, arguments.socket_path, arguments.fd)
    control = ["--control", arguments.control] if arguments.control else []
    tag = ["--tag", arguments.tag] if arguments.tag else []
    # until 'serve' has handlers of its own, and after it: virtiofsd must not be left behind. But nohup(1) has made a
    # hangup harmless
    numbers = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _terminated) for number in numbers}
    try:
        with _virtiofsd([program, "--shared-dir", arguments.shared_dir, *tag, *others]) as device:
            return command(["serve", device, *place, *control])
    except VdpaBridgeError as error:
        print(f"vdpabridge-vhost-user-fs: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminated(*_: object) -> None:
    # success, as of every back-end that is told to end
    raise SystemExit(0)


def blk_parser() -> Parser:
    """The options of `blk`."""
    parser = _parser("vdpabridge-vhost-user-blk", "serve a file as a vhost-user disk")
    parser.add_argument("--blk-file", type=path, metavar="PATH", help="the disk")
    parser.add_argument("--read-only", action="store_true", help="let nobody write it")
    return parser


def fs_parser() -> Parser:
    """The options of `fs`, without those that it hands on."""
    parser = _parser("vdpabridge-vhost-user-fs", "share a folder by virtiofsd, behind vdpabridge")
    parser.add_argument("--shared-dir", type=path, metavar="PATH", help="the folder")
    parser.add_argument("--tag", metavar="TAG", help="what the guest calls it")
    parser.add_argument("--control", type=path, metavar="PATH", help="a control socket, as of 'vdpabridge serve'")
    parser.add_argument("--virtiofsd", type=path, metavar="PATH", help="the program (default: the distribution's)")
    parser.epilog = "Other options go to virtiofsd as they are, for instance --migration-mode find-paths."
    return parser


def _parser(name: str, description: str) -> Parser:
    parser = Parser(prog=name, description=description, allow_abbrev=False)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", type=path, metavar="PATH", help="listen here")
    text = "a socket that is open: one that listens, or is connected"
    where.add_argument("--fd", type=descriptor, metavar="N", help=text)
    parser.add_argument("--print-capabilities", action="store_true", help="print them, as JSON, and do nothing else")
    return parser


def _place(parser: Parser, socket_path: str | None, fd: int | None) -> list[str]:
    if fd is not None:
        return ["--fd", str(fd)]
    if socket_path is None:
        parser.error("--socket-path or --fd is needed")
    return ["--socket-path", socket_path]


def _find_virtiofsd() -> str | None:
    return shutil.which("virtiofsd") or next((each for each in _VIRTIOFSD if os.access(each, os.X_OK)), None)


@contextmanager
def _virtiofsd(words: Sequence[str]) -> Iterator[str]:
    """A virtiofsd that is started by ``words`` and ends with the context: the name of its device."""
    with tempfile.TemporaryDirectory(prefix="vdpabridge-") as folder:
        socket_path = Path(folder) / "virtiofsd.sock"
        process = None
        try:
            # a signal waits until there is something to end
            with uninterrupted():
                process = _start([*words, "--socket-path", str(socket_path)])
            deadline_s = time.monotonic() + _START_S
            while not socket_path.exists():
                if process.poll() is not None:
                    raise VdpaBridgeError(words[0], why=f"it has ended with {process.returncode}: see above")
                if time.monotonic() > deadline_s:
                    raise VdpaBridgeError(words[0], why=f"it does not listen after {_START_S:g} s")
                time.sleep(_PAUSE_S)
            yield f"vhost-user:{socket_path},id=fs"
        finally:
            # a second signal waits until it has ended
            if process is not None:
                with uninterrupted():
                    _end(process)


def _start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        # a signal to the terminal's processes is ours to act upon: virtiofsd ends when the device was stopped
        return subprocess.Popen(words, process_group=0)
    except OSError as error:
        raise VdpaBridgeError("start virtiofsd", device=words[0], why=os.strerror(error.errno or 0)) from error


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
