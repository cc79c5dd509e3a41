"""Images as files, read with a deadline."""

from __future__ import annotations

import os
import select

from ...errors import DeadlineExceeded, VdpaBridgeError
from ..transfer.channel import Limits, wait

__all__ = ["open_image"]


def open_image(path: str, limits: Limits) -> int:
    """A descriptor to read the image at ``path`` from (``-``: standard input), owned by the caller.

    Waits within ``limits`` for a process to write to a FIFO. Raises `VdpaBridgeError`, `DeadlineExceeded`, `Cancelled`.
    """
    try:
        if path == "-":
            return os.dup(0)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise VdpaBridgeError("read", device=path, why=os.strerror(error.errno or 0)) from error
    try:
        wait(fd, select.POLLIN, limits)
    except DeadlineExceeded as error:
        os.close(fd)
        raise DeadlineExceeded("read", error.timeout_s, device=path, hint="nobody writes to it") from None
    except BaseException:
        os.close(fd)
        raise
    return fd
