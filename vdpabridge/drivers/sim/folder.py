"""A real folder, as the simulated virtio-fs device shares it: read-only, files and directories only.

The device never reads anything outside of the folder: it goes from the folder's own descriptor downwards, one name at a
time, and follows no link, whatever other processes do in the folder meanwhile. Links and devices in it are not shared.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .tree import Directory, File, Node

__all__ = ["Folder"]

#: Never through a link, and never waiting for a process that writes to a FIFO.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER_FLAGS = _FLAGS | os.O_DIRECTORY
#: Errors that mean that there is no such file, or none that is shared. Others are this process's own trouble.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG)


class _Root:
    """The descriptor of the shared folder."""

    def __init__(self, path: str) -> None:
        # the folder itself may be named by a link
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close it. Idempotent; what is read afterwards is an error (EBADF)."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@contextmanager
def _opened(root: _Root, names: tuple[str, ...]) -> Iterator[int]:
    """The descriptor of the directory at ``names`` below ``root``."""
    if root.fd < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    fd = os.open(".", _FOLDER_FLAGS, dir_fd=root.fd)
    try:
        for name in names:
            below = os.open(name, _FOLDER_FLAGS, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


class _FileOnDisk(File):
    def __init__(self, root: _Root, folder: tuple[str, ...], name: str) -> None:
        self._root = root
        self._folder = folder
        self._name = name

    @property
    def size_bytes(self) -> int:
        try:
            with _opened(self._root, self._folder) as fd:
                return os.stat(self._name, dir_fd=fd, follow_symlinks=False).st_size
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise
            return 0

    def read(self, offset: int, size_bytes: int) -> bytes:
        with _opened(self._root, self._folder) as folder:
            fd = os.open(self._name, _FLAGS, dir_fd=folder)
        try:
            return os.pread(fd, size_bytes, offset)
        finally:
            os.close(fd)


class Folder(Directory):
    """The folder at ``path``, as it is whenever the guest looks. Raises OSError if it is not one. Owns a descriptor."""

    def __init__(self, path: str) -> None:
        self._root = _Root(path)
        self._names: tuple[str, ...] = ()

    def listing(self) -> Iterable[tuple[str, bool]]:
        with _opened(self._root, self._names) as fd, os.scandir(fd) as entries:
            kinds = [(each.name, each.is_dir(follow_symlinks=False), each) for each in entries]
            return sorted(
                (name, folder) for name, folder, each in kinds if folder or each.is_file(follow_symlinks=False)
            )

    def entry(self, name: str) -> Node | None:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            return None
        try:
            with _opened(self._root, self._names) as fd:
                mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise
            return None
        if stat.S_ISDIR(mode):
            return self._below(name)
        return _FileOnDisk(self._root, self._names, name) if stat.S_ISREG(mode) else None

    def close(self) -> None:
        self._root.close()

    def _below(self, name: str) -> Folder:
        folder = Folder.__new__(Folder)
        folder._root = self._root
        folder._names = (*self._names, name)
        return folder
