"""The files beside a control socket that tell a later process whose the state of its device is."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["forget", "is_there", "moves_in", "write"]

#: More than any such file has.
_SIZE_BYTES = 4096


def is_there(path: str) -> bool:
    """Whether there is a file at ``path``, whatever it is."""
    return os.path.lexists(path)


def write(path: str, text: str, moves: Sequence[str]) -> bool:
    """Make the file at ``path``, whole or not at all; returns whether it was not there before. Raises OSError."""
    new = not is_there(path)
    try:
        # O_NONBLOCK: a FIFO that nobody reads is refused
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "w") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            file.write(f"{text} While this file exists, a new process does not start it.\n")
            file.writelines(f"Move: {move}\n" for move in moves)
    except BaseException:
        if new:
            with suppress(OSError):
                os.unlink(path)
        raise
    return new


def moves_in(path: str) -> list[str]:
    """The moves that the file at ``path`` names. A file that cannot be read, or somebody else's, names none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        content = os.read(fd, _SIZE_BYTES)
    except OSError:
        return []
    finally:
        os.close(fd)
    return [each.decode() for each in re.findall(rb"^Move: ([\w.-]{1,64})$", content, re.MULTILINE)]


def forget(path: str) -> None:
    """Remove the file at ``path``, if there is one. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(path)
