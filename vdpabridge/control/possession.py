"""Whether the state that a device has is the guest's, or belongs to another device: then the device is held.

A move has two moments at which two devices have the same state. The source has given its state away when a mover says
`moved`: it is held from then on. The destination has got it before that: it is held until the mover says `arrived`. A
mover that dies at any point leaves at most one device that can run.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from ..errors import VdpaBridgeError
from ..export.vhost_user.server import Server

__all__ = ["Possession"]

#: Holds a device whose state has gone to another device.
_MOVED = "moved"
#: Holds a device whose state came from another device, which may run.
_ARRIVING = "arriving"
_TEXT = (
    "The state of this device was moved to another device. While this file exists, a new process does not start it.\n"
)


class Possession:
    """Of the device that ``server`` serves. ``marker`` is a file that exists while its state is another device's, for a
    process that comes after this one; None for none."""

    def __init__(self, server: Server, marker: str | None = None) -> None:
        self._server = server
        self._marker = marker
        self._mover: object = None
        """Who has brought the state that is arriving, as long as he is connected."""
        self._resets = 0
        """How often the device was reset before that."""
        if marker is not None and os.path.lexists(marker):
            server.hold(_MOVED)

    @property
    def moved(self) -> bool:
        """Whether the state was moved to another device."""
        return self._server.holds(_MOVED)

    @property
    def arriving(self) -> bool:
        """Whether the state came from another device, and it is not confirmed that this one may not run."""
        return self._server.holds(_ARRIVING)

    def require(self, what: str, device: str) -> None:
        """Raise if the state is, or may be, another device's."""
        if self.arriving:
            why = "its state came from another device, which may run: no mover has said that it does not"
            hint = "if that one is 'moved', or its process has ended for good: 'vdpabridge resume --force'"
            raise VdpaBridgeError(what, device=device, why=why, hint=hint)
        if self.moved:
            why = "its state was moved to another device; if both run, the guest's data is destroyed"
            hint = "'vdpabridge resume --force', if the other device does not run and never will"
            raise VdpaBridgeError(what, device=device, why=why, hint=hint)

    def give_away(self) -> None:
        """The state is another device's from now on. Raises OSError, or what suspending raises: then it is not."""
        # first the file: a process that ends behind it has not said that it was moved
        written = self._marker is not None and _write(self._marker)
        try:
            self._server.hold(_MOVED)
        except BaseException:
            if written:
                self._forget()
            raise

    def require_no_other(self, mover: object, what: str, device: str) -> None:
        """Raise if somebody else, who is still connected, is moving state into the device."""
        if self.arriving and self._mover not in (None, mover):
            why, hint = "another client is moving state into it", "try again when that has ended"
            raise VdpaBridgeError(what, device=device, why=why, hint=hint)

    def expect(self) -> bool:
        """The state of another device is about to come; returns whether that was not so before."""
        new = not self.arriving
        self._server.hold(_ARRIVING)
        return new

    def came(self, mover: object, resets: int) -> None:
        """``mover`` has brought it. ``resets``: how often the device was reset so far; another one loses the state."""
        self._mover, self._resets = mover, resets

    def not_come(self) -> None:
        """It has not come after all."""
        self._server.release(_ARRIVING)

    def left(self, client: object) -> None:
        """``client`` has left. If it was the mover, nobody can say any more that the state has arrived."""
        if self._mover is client:
            self._mover = None

    def require_brought(self, mover: object, device: str, resets: int) -> None:
        """Raise if the state is not the one that ``mover`` has brought, or is not there any more."""
        if not self.arriving or self._mover is not mover:
            why, hint = "this client has brought no state", "'vdpabridge status' says what the device has"
            raise VdpaBridgeError("arrived", device=device, why=why, hint=hint)
        if resets != self._resets:
            why = "the device was reset after the state had come, and has lost it"
            raise VdpaBridgeError("arrived", device=device, why=why, hint="the device it came from still has it")

    def take(self) -> None:
        """The state is this device's: from now on its front-end says whether it runs."""
        if self.moved:
            self._forget()
        self._mover = None
        for holder in (_ARRIVING, _MOVED):
            self._server.release(holder)

    def _forget(self) -> None:
        if self._marker is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._marker)


def _write(path: str) -> bool:
    """Make the file at ``path``, whole or not at all; returns whether it was not there before. Raises OSError."""
    new = not os.path.lexists(path)
    try:
        # O_NONBLOCK: a FIFO that nobody reads is refused
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "w") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            file.write(_TEXT)
    except BaseException:
        if new:
            with suppress(OSError):
                os.unlink(path)
        raise
    return new
