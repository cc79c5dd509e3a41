"""The smallest guest: a busybox and one script, as an initial RAM file system that boots in a second.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux: the "newc" cpio format.
"""

from __future__ import annotations

import stat
from pathlib import Path

__all__ = ["write_initramfs"]

_DIRECTORIES = ("bin", "dev", "proc", "sys", "mnt", "tmp")
_ALIGN_BYTES = 4


def write_initramfs(path: Path, busybox: Path, script: Path) -> None:
    """Write to ``path`` an archive with ``busybox`` (statically linked) as /bin/busybox and ``script`` as /init."""
    members: list[tuple[str, int, bytes]] = [(name, stat.S_IFDIR | 0o755, b"") for name in _DIRECTORIES]
    members.append(("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    members.append(("init", stat.S_IFREG | 0o755, script.read_bytes()))
    members.append(("TRAILER!!!", 0, b""))
    path.write_bytes(b"".join(_member(number, *member) for number, member in enumerate(members, 1)))


def _member(number: int, name: str, mode: int, data: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, device, rdev, rdev, name's length, checksum
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + bytes(-len(head) % _ALIGN_BYTES) + data + bytes(-len(data) % _ALIGN_BYTES)
