"""A file that is there whole, or as it was before."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..errors import VdpaBridgeError

__all__ = ["replacing"]


@contextmanager
def replacing(path: str) -> Iterator[int]:
    """A descriptor to write what shall be at ``path``, which it is when the body ends well, also after a power cut.

    A symbolic link is followed; what was there keeps its mode. Raises `VdpaBridgeError` where the file cannot be made.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise VdpaBridgeError("write", device=path, why="what is there is no file", hint="it is not replaced")
    folder = os.path.dirname(target)
    name = os.path.join(folder, f".{os.path.basename(target)}.{os.getpid()}")
    with _explaining(path):
        fd = _without_name(folder, name)
    try:
        try:
            os.fchmod(fd, _mode_of(target))
            yield fd
            with _explaining(path):
                _name(fd, name)
        finally:
            os.close(fd)
        with _explaining(path):
            os.replace(name, target)
            _sync_folder(folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextmanager
def _explaining(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VdpaBridgeError("write", device=path, why=os.strerror(error.errno or 0)) from error


def _name(fd: int, name: str) -> None:
    """Give the file, all of which is safe, its name, if it has none."""
    os.fsync(fd)
    if not os.path.exists(name):
        # a descriptor of a directory, of no use to an absolute path, makes Python follow the link for once
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)


def _without_name(folder: str, name: str) -> int:
    """A file that goes with the process, whatever ends it; on file systems that have none such, one called ``name``."""
    with suppress(FileNotFoundError):
        os.unlink(name)
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _mode_of(path: str) -> int:
    """The mode of what is there; else that only its owner reads it: it holds a guest's data."""
    try:
        return os.stat(path).st_mode & 0o777
    except FileNotFoundError:
        return 0o600


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
