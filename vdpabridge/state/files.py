"""A file that is there whole, or as it was before."""

from __future__ import annotations

import os
import tempfile
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
    try:
        fd, name = tempfile.mkstemp(prefix=f".{os.path.basename(target)}.", dir=folder)
    except OSError as error:
        raise VdpaBridgeError("write", device=path, why=os.strerror(error.errno or 0)) from error
    try:
        try:
            os.fchmod(fd, _mode_of(target))
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(folder)


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
