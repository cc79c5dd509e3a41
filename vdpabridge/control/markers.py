"""The files beside a control socket that tell a later process whose the state of its device is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress

from ..errors import VdpaBridgeError
from ..linux.files import replacing

__all__ = ["forget", "is_there", "moves_in", "write"]

#: More than any such file has.
_SIZE_BYTES = 4096


def is_there(path: str) -> bool:
    """Whether there is a file at ``path``, whatever it is."""
    return os.path.lexists(path)


def write(path: str, text: str, moves: Sequence[str]) -> bool:
    """Make the file at ``path``, or replace it, as `replacing` does; returns whether it was not there before.

    Raises `VdpaBridgeError`.
    """
    new = not is_there(path)
    lines = [f"{text} While this file exists, a new process does not start it.", *(f"Move: {move}" for move in moves)]
    with replacing(path) as fd:
        try:
            with open(fd, "w", closefd=False) as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise VdpaBridgeError("write", device=path, why=os.strerror(error.errno or 0)) from error
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
