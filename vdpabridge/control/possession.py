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

from ..device import Device, RunState
from ..errors import VdpaBridgeError
from ..export.vhost_user.server import Server

__all__ = ["Possession"]

#: Holds a device whose state has gone to another device.
_MOVED = "moved"
#: Holds a device whose state comes from another device, which may run.
_ARRIVING = "arriving"
_TEXTS = {
    _MOVED: "The state of this device was moved to another device.",
    _ARRIVING: "This device was to get the state of another device, which may run.",
}


class Possession:
    """Of ``device``, which ``server`` serves. While the state is another device's, there is a file ``path.moved`` or
    ``path.arriving``, if ``path`` is given: for a process that comes after this one."""

    def __init__(self, server: Server, device: Device, path: str | None = None) -> None:
        self._server = server
        self._device = device
        self._path = path
        self._mover: object = None
        """Who has brought the state that is arriving, as long as he is connected."""
        self._coming = False
        """Whether the state is under way."""
        self._version: int | None = None
        """The device's `state_version` with the state that was moved; None if this process has not seen it."""
        self._arrived: int | None = None
        """The same of a state that has arrived."""
        for holder in _TEXTS:
            if path is not None and os.path.lexists(f"{path}.{holder}"):
                server.hold(holder)

    @property
    def moved(self) -> bool:
        """Whether the state was moved to another device."""
        return self._server.holds(_MOVED)

    @property
    def arriving(self) -> bool:
        """Whether the state comes from another device, and it is not confirmed that this one may not run."""
        return self._server.holds(_ARRIVING)

    @property
    def lost(self) -> bool:
        """Whether the device does not have the state any more that it was moved with, or that came."""
        return (self.moved or self.arriving) and not self._coming and self._version != self._device.state_version

    @property
    def arrived(self) -> bool:
        """Whether the device has the state of another device, and it is this one's now."""
        return self._arrived == self._device.state_version

    def require(self, what: str) -> None:
        """Raise if the state is, or may be, another device's."""
        if self.arriving and self.lost:
            why = "it was to get the state of another device, and does not have it (any more)"
            hint = (
                "move it again; or begin without that state by 'vdpabridge resume --force', if the other device does "
                "not run and never will"
            )
        elif self.arriving:
            why = "its state came from another device, which may run: no mover has said that it does not"
            hint = "if that one is 'moved', or its process has ended for good: 'vdpabridge resume --force'"
        elif self.moved:
            why = "its state was moved to another device; if both run, the guest's data is destroyed"
            hint = "'vdpabridge resume --force', if the other device does not run and never will"
        else:
            return
        raise VdpaBridgeError(what, device=self._device.name, why=why, hint=hint)

    def give_away(self) -> None:
        """The state is another device's from now on. Raises OSError, or what suspending raises: then it is not."""
        self._hold(_MOVED)
        self._version, self._arrived = self._device.state_version, None

    def require_no_other(self, mover: object, what: str) -> None:
        """Raise if somebody else, who is still connected, is moving state into the device."""
        if self.arriving and self._mover not in (None, mover):
            why, hint = "another client is moving state into it", "try again when that client has left"
            raise VdpaBridgeError(what, device=self._device.name, why=why, hint=hint)

    def require_room(self, what: str) -> None:
        """Raise if state that nobody else has any more has arrived in the device, and nobody has started it."""
        if self.arrived and self._device.state is RunState.RESET:
            why = "the state of another device has arrived in it, and no front-end has started it"
            hint = "start it; or end its process, if that state is not wanted"
            raise VdpaBridgeError(what, device=self._device.name, why=why, hint=hint)

    def expect(self) -> bool:
        """The state of another device is about to come; returns whether that was not so before. Raises as
        `give_away`."""
        new = not self.arriving
        self._hold(_ARRIVING)
        self._coming = True
        return new

    def came(self, mover: object) -> None:
        """``mover`` has brought it. A reset, or another load, loses it."""
        self._mover, self._version, self._coming = mover, self._device.state_version, False

    def not_come(self, *, new: bool) -> None:
        """It has not come after all. ``new``: what `expect` returned."""
        self._coming = False
        if new:
            self._forget(_ARRIVING)
            self._server.release(_ARRIVING)

    def left(self, client: object) -> None:
        """``client`` has left. If it was the mover, nobody can say any more that the state has arrived."""
        if self._mover is client:
            self._mover = None

    def require_brought(self, mover: object) -> None:
        """Raise if the state is not the one that ``mover`` has brought, or is not there any more."""
        if self.arrived:
            # said before, perhaps without an answer that reached anybody
            return
        if not self.arriving or self._mover is not mover:
            why, hint = "this client has brought no state", "'vdpabridge status' says what the device has"
            raise VdpaBridgeError("arrived", device=self._device.name, why=why, hint=hint)
        if self.lost:
            why = "after the state had come, the device was reset or was given other state: it has lost it"
            raise VdpaBridgeError("arrived", device=self._device.name, why=why)

    def take(self) -> None:
        """The state is this device's: from now on its front-end says whether it runs."""
        for holder in (_ARRIVING, _MOVED):
            if self._server.holds(holder):
                self._forget(holder)
        # only now: a file that stays holds the process that comes after
        if self.arriving:
            self._arrived = self._version
        self._mover = None
        for holder in (_ARRIVING, _MOVED):
            self._server.release(holder)

    def _hold(self, holder: str) -> None:
        # first the file: a process that ends behind it has not said anything yet
        written = self._path is not None and _write(f"{self._path}.{holder}", _TEXTS[holder])
        try:
            self._server.hold(holder)
        except BaseException:
            if written:
                self._forget(holder)
            raise

    def _forget(self, holder: str) -> None:
        if self._path is not None:
            with suppress(FileNotFoundError):
                os.unlink(f"{self._path}.{holder}")


def _write(path: str, text: str) -> bool:
    """Make the file at ``path``, whole or not at all; returns whether it was not there before. Raises OSError."""
    new = not os.path.lexists(path)
    try:
        # O_NONBLOCK: a FIFO that nobody reads is refused
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "w") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            file.write(f"{text} While this file exists, a new process does not start it.\n")
    except BaseException:
        if new:
            with suppress(OSError):
                os.unlink(path)
        raise
    return new
