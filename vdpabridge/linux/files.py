"""Replacing files: afterwards a file is complete, or as it was before."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..errors import VdpaBridgeError

__all__ = ["replacing"]

#: Only its owner may read it, whatever the old file's mode was: it holds a guest's data.
_MODE = 0o600


@contextmanager
def replacing(path: str) -> Iterator[int]:
    """A descriptor (borrowed) for the new content of ``path``; if the body does not raise, it replaces the file.

    A power cut then does not lose the new content. Raises `VdpaBridgeError` if the file cannot be made, or if there is
    something other than a file: a symbolic link is not followed, because another user may have made it. Once the file
    has been replaced, nothing is raised.
    """
    directory, base = os.path.split(path)
    with _explaining(path):
        folder = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # unique: no other thread uses it, nor a process with the same number in another container
    name = f".vdpabridge-{secrets.token_hex(8)}"
    try:
        _check_replaceable(path, base, folder)
        with _explaining(path):
            fd = _without_name(folder, name)
        try:
            yield fd
            with _explaining(path):
                _name(fd, folder, name)
        finally:
            os.close(fd)
        with _explaining(path):
            os.rename(name, base, src_dir_fd=folder, dst_dir_fd=folder)
        # the file is there and complete: that a power cut may still bring the old one back does not count as a failure
        with suppress(OSError):
            os.fsync(folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(folder)


def _check_replaceable(path: str, base: str, folder: int) -> None:
    try:
        mode = os.stat(base or ".", dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise VdpaBridgeError("write", device=path, why=os.strerror(error.errno or 0)) from error
    if stat.S_ISLNK(mode):
        hint = "name the file that it leads to, or remove it"
        raise VdpaBridgeError("write", device=path, why="it is a symbolic link", hint=hint)
    if not stat.S_ISREG(mode):
        raise VdpaBridgeError("write", device=path, why="it is not a file", hint="it is not replaced")


@contextmanager
def _explaining(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VdpaBridgeError("write", device=path, why=os.strerror(error.errno or 0)) from error


def _name(fd: int, folder: int, name: str) -> None:
    """Sync the file to disk, then give it its name, if it has none."""
    os.fsync(fd)
    if os.fstat(fd).st_nlink == 0:
        # with descriptors of directories Python calls linkat(2), which follows the link when asked to
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)


def _without_name(folder: int, name: str) -> int:
    """A descriptor, owned by the caller, of a file that disappears when the process ends, however it ends.

    On file systems that have no such files, it is one called ``name``.
    """
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _MODE, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(name, flags, _MODE, dir_fd=folder)
