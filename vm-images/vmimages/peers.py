"""Programs of the root file system, run on this machine: the QEMU and the virtiofsd that the tests speak to.

They are extracted from the image without mounting it and started by their own dynamic loader with their own libraries,
so neither root nor a chroot is needed, and this machine's release does not matter.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cache import cached, content_key
from .host import EXTRACT, HostError, command, need, step
from .rootfs import rootfs

__all__ = ["PROGRAMS", "Peers", "peers"]

#: Change this with the steps below, if their result changes.
RECIPE = "1"
#: Program -> where it is in the image. Symbolic links do not work: debugfs would write an empty file.
PROGRAMS = {
    "qemu-system-x86_64": "usr/bin/qemu-system-x86_64",
    "qemu-img": "usr/bin/qemu-img",
    "qemu-io": "usr/bin/qemu-io",
    "qemu-storage-daemon": "usr/bin/qemu-storage-daemon",
    "virtiofsd": "usr/libexec/virtiofsd",
    "busybox": "usr/bin/busybox",
}
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_FOLDERS = (_LIBRARIES, "usr/share/qemu", "usr/share/seabios")
_LOADER = f"{_LIBRARIES}/ld-linux-x86-64.so.2"
_MUST_BE_THERE = (*PROGRAMS.values(), _LOADER, f"{_LIBRARIES}/qemu/block-blkio.so", "usr/share/seabios/bios-256k.bin")


@dataclass(frozen=True)
class Peers:
    """The extracted tree."""

    tree: Path

    def command(self, program: str, *arguments: str) -> list[str]:
        """The words that run ``program`` with ``arguments``."""
        libraries = str(self.tree / _LIBRARIES)
        words = [str(self.tree / _LOADER), "--library-path", libraries, "--argv0", program]
        words.append(str(self.tree / PROGRAMS[program]))
        if program == "qemu-system-x86_64":
            # otherwise QEMU looks for its files where the host's QEMU has them, if there is one
            for folder in ("usr/share/qemu", "usr/share/seabios"):
                words += ["-L", str(self.tree / folder)]
        return [*words, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with the image's QEMU modules in it."""
        return {**os.environ, "QEMU_MODULE_DIR": str(self.tree / _LIBRARIES / "qemu")}

    def path(self, program: str) -> Path:
        """The file of ``program``; it runs as it is only if it is linked statically, as busybox is."""
        return self.tree / PROGRAMS[program]


def peers() -> Peers:
    """The programs; extracted on first use, in less than a second. Builds the root file system if there is none."""
    image = rootfs()
    key = content_key(image.parent.name, RECIPE)
    return Peers(cached("peers", key, lambda work: _extract(image, work), has=[f"tree/{_LOADER}"]) / "tree")


def _extract(image: Path, work: Path) -> dict[str, str]:
    need(EXTRACT)
    tree = work / "tree"
    lines = []
    for path in PROGRAMS.values():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        lines.append(f"dump -p /{path} {tree / path}")
    for path in _FOLDERS:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        lines.append(f"rdump /{path} {(tree / path).parent}")
    with step("taking programs out of the root file system"), tempfile.NamedTemporaryFile("w", dir=work) as script:
        script.write("\n".join(lines) + "\n")
        script.flush()
        # debugfs always ends with 0, and complains about every owner that it may not set
        command(["debugfs", "-f", script.name, image])
    for path in _MUST_BE_THERE:
        if not (tree / path).is_file() or not (tree / path).stat().st_size:
            raise HostError(f"{path} could not be extracted from {image}: remove that directory, and it is built again")
    return {"image": str(image)}
