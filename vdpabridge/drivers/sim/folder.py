"""A real folder, as the simulated virtio-fs device shares it: read-only, files and directories only.

Links and devices in it are not shared, so that the device never reads anything outside of the folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from .tree import Directory, File, Node

__all__ = ["Folder"]

#: Never follow a link, and never wait for a writer of a FIFO.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _FileOnDisk(File):
    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def size_bytes(self) -> int:
        try:
            return os.lstat(self._path).st_size
        except OSError:
            return 0

    def read(self, offset: int, size_bytes: int) -> bytes:
        fd = os.open(self._path, _FLAGS)
        try:
            return os.pread(fd, size_bytes, offset)
        finally:
            os.close(fd)


class Folder(Directory):
    """The folder at ``path``, as it is at each request. Raises OSError if ``path`` is not a folder."""

    def __init__(self, path: str) -> None:
        self._path = path
        os.listdir(path)

    def names(self) -> Iterable[str]:
        with os.scandir(self._path) as entries:
            return sorted(entry.name for entry in entries if _is_shared(entry))

    def entry(self, name: str) -> Node | None:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            return None
        path = os.path.join(self._path, name)
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode):
                return Folder(path)
        except (OSError, ValueError):
            return None
        return _FileOnDisk(path) if stat.S_ISREG(mode) else None


def _is_shared(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
