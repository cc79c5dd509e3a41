"""The host: Debian packages that a step needs, progress lines, and commands run with readable failures."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["BUILD_KERNEL", "BUILD_ROOT", "EXTRACT", "RUN", "HostError", "as_root", "command", "need", "step"]

#: What each step needs: path or program -> the Debian package that brings it.
RUN = {"qemu-system-x86_64": "qemu-system-x86"}
BUILD_ROOT = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "zstd": "zstd"}
EXTRACT = {"debugfs": "e2fsprogs"}
BUILD_KERNEL = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "patch": "patch",
    "xz": "xz-utils",
    "rsync": "rsync",
    "/usr/include/gelf.h": "libelf-dev",
    "/usr/include/openssl/ssl.h": "libssl-dev",
}


#: An ordinary user's PATH does not have mke2fs and others.
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class HostError(RuntimeError):
    """The host lacks something, or a command on it failed; the text says what and what to do."""


def need(table: dict[str, str]) -> None:
    """Install the Debian packages of ``table`` whose program or file is missing."""
    missing = sorted(
        {
            package
            for what, package in table.items()
            if not (Path(what).exists() if what.startswith("/") else shutil.which(what, path=_PATH))
        }
    )
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise HostError(
            f"missing {', '.join(missing)} (Debian package names) and no apt-get here: install them yourself"
        )
    with step(f"installing {' '.join(missing)}"):
        environment = [*as_root(), "env", "DEBIAN_FRONTEND=noninteractive"]
        # a machine that was just set up may be busy with its own updates
        patient = ("-o", "DPkg::Lock::Timeout=300")
        install = [*environment, "apt-get", *patient, "install", "-qq", "-y", "--no-install-recommends", *missing]
        if subprocess.run(install, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
            command([*environment, "apt-get", "update", "-qq"])
            command(install)


def as_root() -> list[str]:
    """The words to put before a command that needs root: none for root itself."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo"):
        return ["sudo"]
    raise HostError("this step needs root: run it as root, or install sudo")


def command(words: Sequence[str | os.PathLike[str]], *, cwd: Path | None = None) -> str:
    """Run a command, return its standard output; a failure carries the last lines that it printed."""
    with subprocess.Popen(
        words,
        cwd=cwd,
        env=os.environ | {"PATH": _PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            # with all that it has started: a compiler would run for minutes, in a folder that does not exist any more
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if process.returncode:
        tail = "\n  ".join((errors or output).strip().splitlines()[-15:])
        raise HostError(f"{' '.join(str(word) for word in words)}: exit {process.returncode}\n  {tail}")
    return output


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say on stderr that ``what`` begins, and how long it took."""
    print(f"vm-images: {what} ...", file=sys.stderr, flush=True)
    begin_s = time.monotonic()
    yield
    print(f"vm-images: {what}: {time.monotonic() - begin_s:.0f} s", file=sys.stderr, flush=True)
