"""The test machine's root file system: Debian stable as one ext4 image."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

from .cache import cached, content_key
from .debian import archive_sources
from .host import BUILD_ROOT, as_root, command, need, step
from .places import data_folder

__all__ = ["PACKAGES", "SUITE", "rootfs"]

#: Change this with the steps below, if their result changes.
RECIPE = "1"
SUITE = "trixie"
INIT = data_folder("guest") / "init"
PACKAGES = (
    *("python3", "python3-pytest", "python3-hypothesis", "python3-pyroute2", "python3-cffi"),
    *("udev", "iproute2", "kmod", "procps", "strace", "e2fsprogs"),
    *("qemu-system-x86", "qemu-utils", "qemu-block-extra", "virtiofsd", "fio"),
    # for the smallest guest (initramfs.py)
    "busybox-static",
)
SPARE_BYTES = 512 << 20


def rootfs() -> Path:
    """The image; built on first use."""
    key = content_key(SUITE, "\n".join(PACKAGES), INIT, RECIPE)
    return cached("rootfs", key, _build, has=["root.ext4"]) / "root.ext4"


def _build(work: Path) -> dict[str, str]:
    need(BUILD_ROOT)
    image = work / "root.ext4"
    scratch = Path(tempfile.mkdtemp(prefix="rootfs-", dir=work))
    try:
        with step(f"making the {SUITE} root file system"):
            _make(scratch, image)
    finally:
        # root owns its files
        command([*as_root(), "rm", "-rf", scratch])
    return {"suite": SUITE, "packages": " ".join(PACKAGES)}


def _make(scratch: Path, image: Path) -> None:
    sources = scratch / "sources.list"
    sources.write_text(archive_sources(SUITE))
    tree = scratch / "tree"
    # what the guest compiles is thrown away with the guest, so it is compiled here
    compile_all = 'chroot "$1" python3 -m compileall -q /usr/lib/python3 /usr/lib/python3.13 || true'
    command(
        [
            *as_root(),
            *("mmdebstrap", "--quiet", "--variant=minbase", "--format=directory"),
            "--include=" + ",".join(PACKAGES),
            # documentation and the compiled-in locales are half of what is left
            *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"),
            *("--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/lib/firmware/*"),
            f"--customize-hook=copy-in {shlex.quote(str(INIT))} /",
            f"--customize-hook={compile_all}",
            *(SUITE, tree, sources),
        ]
    )
    used = int(command([*as_root(), "du", "-sx", "--block-size=1", tree]).split()[0])
    blocks = str((used * 11 // 10 + SPARE_BYTES) // 4096)
    options = "lazy_itable_init=1,root_owner=0:0,nodiscard"
    mke2fs = [*as_root(), "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "^has_journal", "-E", options]
    command([*mke2fs, "-d", tree, image, blocks])
    command([*as_root(), "chown", f"{os.getuid()}:{os.getgid()}", image])
