"""``python3 -m vmimages``: build what is missing, boot it, run a command in it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .host import HostError
from .kernel import DEFAULT_KERNEL, KERNELS, kernel
from .rootfs import rootfs
from .runner import run

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SUITE = ["python3", "-m", "pytest", "-q", "-p", "tests.ktap", "tests/vm"]
#: One RAM disk behind every simulated block device, as a migration's source and destination need it (6.12 and later).
KERNEL_ARGUMENTS = "vdpa_sim_blk.shared_backend=1"


def main() -> int:
    """Parse the command line; the exit code is the command's, or one of `runner.Outcome`'s (2: usage, 3: no image)."""
    parser = argparse.ArgumentParser(
        prog="vm-images/run",
        usage="%(prog)s [options] [KERNEL] [-- COMMAND ...]",
        description="Boot a kernel in QEMU, with Debian and this checkout in it, and run a command there as root.",
        epilog="exit code: the command's own; 124 time limit, 125 kernel panic, 126 machine ended early, 3 no image",
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
    parser.add_argument("--kernel-log", type=Path, metavar="FILE", help="keep what the guest's kernel said")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set in the guest; may be repeated"
    )
    parser.add_argument("--build-only", action="store_true", help="build what is missing, boot nothing")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words = parser.parse_args(sys.argv[1:split])
    command = sys.argv[split + 1 :] or SUITE
    try:
        bootable = kernel(words.kernel)
        if words.build_only:
            print(bootable.image, rootfs(), sep="\n")
            return 0
        result = run(
            bootable,
            command,
            repository=REPOSITORY,
            time_limit_s=words.time_limit,
            memory_mib=words.memory,
            kernel_arguments=words.kernel_arguments,
            environment=dict(pair.split("=", 1) for pair in words.env),
        )
    except HostError as error:
        print(f"vm-images: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("vm-images: interrupted", file=sys.stderr)
        return 130
    if words.kernel_log:
        words.kernel_log.write_text(result.kernel_log)
    if result.why:
        print(f"vm-images: {bootable.name}: {result.why}", file=sys.stderr)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
