"""State from one process that owns a device into another, through a pipe between the two."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from typing import Any

from ..errors import VdpaBridgeError
from .client import ControlClient

__all__ = ["move"]


def move(
    source: ControlClient, destination: ControlClient, *, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have ``source`` save into ``destination``; what both say of it. The source's device stays suspended.

    Where that fails, or this process ends before it is done, the source's device goes on. ``progress`` is told how many
    bytes of device state have gone. Raises the error of the side that caused it.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    there: list[Exception] = []
    here: list[VdpaBridgeError] = []
    saved: dict[str, Any] = {}
    loaded: dict[str, Any] = {}

    def load_there() -> None:
        try:
            loaded.update(destination.ask("load", reader))
        except Exception as error:  # noqa: BLE001  # it is raised where somebody hears it
            there.append(error)
        finally:
            os.close(reader)

    thread = threading.Thread(target=load_there)
    thread.start()
    try:
        saved.update(source.ask("save", writer, stay="connection", progress=progress))
    except VdpaBridgeError as error:
        here.append(error)
    finally:
        os.close(writer)
        thread.join()
    if here or there:
        # it goes on without being told where it has lost us already
        with contextlib.suppress(VdpaBridgeError):
            source.ask("resume")
        # a destination that refuses does not read on, which the source sees as a broken pipe
        broken = bool(here) and os.strerror(errno.EPIPE) in here[0].why
        raise (there or here)[0] if broken else (here or there)[0]
    # for good: not only for as long as we are connected
    source.ask("suspend")
    return saved, loaded
