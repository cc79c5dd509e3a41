"""``python3 -m vmimages``: build what is missing, boot it, run a command in it."""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from .cache import cache_root
from .host import HostError
from .kernel import DEFAULT_KERNEL, KERNELS, Kernel, NothingNewer, kernel
from .places import INSTALLED, PROGRAM, REPOSITORY
from .rootfs import rootfs
from .runner import Outcome, OutputLost, Result, run

#: Exit codes that no command has: wrong usage, nothing to boot.
USAGE, NO_IMAGE = 120, 121
#: The suite's own exit code if it has only skips.
NOTHING_TESTED = 4
KTAP = "tests.ktap"
_IN_KTAP = ("python3", "-m", KTAP)
_ALL = "tests/vm"
_MAPPING = ("tests/vm/test_mapping.py", "tests/vm/test_suspend.py", "tests/vm/test_killed.py")
#: More kernel arguments -> what is run with them. They make the simulator work as hardware does: by physical address,
#: with pages that are pinned and counted as locked memory; and told of each mapping (dma_map), not of all (set_map).
SUITE = {
    "": (*_IN_KTAP, _ALL),
    "vdpa_sim.use_va=0": (*_IN_KTAP, *_MAPPING),
    "vdpa_sim.batch_mapping=0": (*_IN_KTAP, *_MAPPING),
}
#: The suite's last line.
TOTALS = re.compile(rb"^# Totals: pass:[1-9]", re.MULTILINE)
MEMORY_MIB_MIN = 256
#: One RAM disk behind every simulated block device, and one name for every simulated file server, as a migration's
#: source and destination need it (6.12 and later).
KERNEL_ARGUMENTS = "vdpa_sim_blk.shared_backend=1 vdpa_sim_fs.tag=vdpabridge"
#: Set in the guest if the kernel has the proposal of device state: then its tests are not left out.
_WITH_STATE = "VDPABRIDGE_WITH_STATE"


def main() -> int:
    """Parse the command line; the exit code is the command's, one of `runner.Outcome`'s, or one of those above."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [options] [KERNEL] [-- COMMAND ...]",
        description="Boot a kernel in QEMU, with Debian and vdpabridge in it, and run a command there as root.",
        epilog="exit code: the command's own; 120 wrong usage, 121 nothing to boot, 122 no verdict (the suite did not "
        "say what it tested, or nobody read the output), 123 the kernel warned, 124 time limit, 125 it panicked, "
        "126 the machine ended early",
    )
    names = ", ".join(KERNELS)
    parser.add_argument(
        "kernel",
        nargs="?",
        default=DEFAULT_KERNEL,
        help=f"{names}, a kernel source tree, or a bzImage (default: {DEFAULT_KERNEL})",
    )
    parser.add_argument("--time-limit", type=float, default=900, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument(
        "--memory", type=int, default=1024, metavar="MIB", help="the guest's memory (default: %(default)s)"
    )
    parser.add_argument("--kernel-arguments", default=KERNEL_ARGUMENTS, metavar="WORDS", help="default: %(default)s")
    parser.add_argument(
        "--kernel-log",
        type=Path,
        metavar="FILE",
        help="keep the log of the guest's kernel here (default: logs/ in the cache)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="more symbols for a source tree's configuration")
    parser.add_argument("--refresh", action="store_true", help="a kernel from Debian: ask for a newer source")
    text = "set in the guest; may be repeated"
    parser.add_argument("--env", action="append", type=_pair, default=[], metavar="NAME=VALUE", help=text)
    text = "a file or folder that the guest has as /run/payload/with/NAME; may be repeated"
    parser.add_argument("--with", action="append", type=Path, default=[], dest="extra", metavar="PATH", help=text)
    parser.add_argument("--build-only", action="store_true", help="build what is missing, boot nothing")
    text = "of the suite, only the tests whose names match, as pytest's -k has it: 'suspend and not resume'. Once only"
    parser.add_argument("--test", metavar="EXPRESSION", help=text)
    parser.add_argument("--list", action="store_true", help="print the names of the suite's tests, and run none")
    # so that the machine ends with this process, also if something other than Ctrl-C ends it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words = parser.parse_args(sys.argv[1:split])
    command = sys.argv[split + 1 :]
    if not 0 < words.time_limit < math.inf or words.memory < MEMORY_MIB_MIN:
        parser.error(f"the time limit is above 0, and the memory is at least {MEMORY_MIB_MIN} MiB")
    if words.config is not None and words.kernel in KERNELS:
        parser.error(f"--config is for a source tree: {words.kernel} has the configuration here")
    if command and (words.test or words.list):
        parser.error("--test and --list are for the suite, not for a command")
    if INSTALLED and not command and not words.build_only:
        parser.error("the suite is in a checkout of vdpabridge: here say which command to run, behind --")
    return _attempt(words, command)


#: Exit codes if nothing was run.
_CODES = {NothingNewer: NOTHING_TESTED, OutputLost: Outcome.NO_VERDICT.value, Exception: NO_IMAGE}


def _attempt(words: argparse.Namespace, command: Sequence[str]) -> int:
    """Build what is missing and run ``command``, or the suite; the exit code."""
    try:
        bootable = kernel(words.kernel, extra_config=words.config, refresh=words.refresh)
        if words.build_only:
            print(bootable.image, rootfs(), sep="\n")
            return 0
        for arguments, its_command in _commands(words, command).items():
            if arguments:
                print(f"vm-images: {bootable.name}: once more, with {arguments}", file=sys.stderr, flush=True)
            result = run(
                bootable,
                its_command,
                repository=REPOSITORY,
                time_limit_s=words.time_limit,
                memory_mib=words.memory,
                kernel_arguments=f"{words.kernel_arguments} {arguments}".strip(),
                environment={_WITH_STATE: "1"} | dict(words.env) if bootable.has_state else dict(words.env),
                extra=[*words.extra, *_unless_given(bootable.for_guest, words.extra)],
            )
            code = _verdict(words, bootable, its_command, result)
            if code:
                return code
    except (OutputLost, HostError, OSError, ValueError) as error:
        print(f"vm-images: {error}", file=sys.stderr)
        return next(code for kind, code in _CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        print("vm-images: interrupted", file=sys.stderr)
        return 130
    return 0


def _unless_given(paths: Sequence[Path], given: Sequence[Path]) -> Sequence[Path]:
    names = {path.name for path in given}
    return [path for path in paths if path.name not in names]


def _commands(words: argparse.Namespace, command: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """More kernel arguments -> what is run with them."""
    if words.list:
        return {
            "": ("python3", "-m", "pytest", "--collect-only", "-q", "--no-header", "--no-summary", *_of_suite(words))
        }
    if words.test:
        return {"": (*_IN_KTAP, *_of_suite(words))}
    return {"": command} if command else SUITE


def _of_suite(words: argparse.Namespace) -> Sequence[str]:
    return (_ALL, "-k", words.test) if words.test else (_ALL,)


def _verdict(words: argparse.Namespace, bootable: Kernel, command: Sequence[str], result: Result) -> int:
    """Keep the log of ``result``, and print why it failed, if it did; the exit code."""
    _keep_log(words.kernel_log, bootable.name, result.kernel_log)
    if result.why:
        print(f"vm-images: {bootable.name}: {result.why}", file=sys.stderr)
    if words.test and result.exit_code == NOTHING_TESTED:
        print(f"vm-images: no test ran: --list has the names that {words.test!r} is compared with", file=sys.stderr)
    if KTAP in command and result.exit_code == 0 and not TOTALS.search(result.output_end):
        print(f"vm-images: {bootable.name}: the suite ended well, but tested nothing", file=sys.stderr)
        return Outcome.NO_VERDICT.value
    return result.exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong, with an exit code that no command is likely to have."""
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def _keep_log(file: Path | None, name: str, log: str) -> None:
    """Keep the guest kernel's log in ``file``, by default in the cache. If that fails, the result still counts."""
    if file is None:
        file = cache_root() / "logs" / f"{Path(name).name}.log"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(log)
    except OSError as error:
        print(f"vm-images: the kernel's log is lost: {error}", file=sys.stderr)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _terminated(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
