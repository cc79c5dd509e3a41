"""Whether the state that a device has is the guest's, or belongs to another device: then the device is held.

A move has two moments at which two devices have the same state. The source has given its state away when a mover says
`moved`: it is held from then on. The destination has got it before that: it is held until the mover says `arrived`. A
mover that dies at any point leaves at most one device that can run.
"""

from __future__ import annotations

import os
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
            hint = (
                "if that one is 'moved', or was reset, or its process has ended for good: 'vdpabridge resume --force'"
            )
            raise VdpaBridgeError(what, device=device, why=why, hint=hint)
        if self.moved:
            why = "its state was moved to another device; if both run, the guest's data is destroyed"
            hint = "'vdpabridge resume --force', if the other device does not run and never will"
            raise VdpaBridgeError(what, device=device, why=why, hint=hint)

    def give_away(self) -> None:
        """The state is another device's from now on. Raises OSError, or what suspending raises: then it is not."""
        if self._marker is not None:
            # first the file: a process that ends here has not said that it was moved
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(self._marker, flags, 0o600), "w") as file:
                file.write(_TEXT)
        try:
            self._server.hold(_MOVED)
        except BaseException:
            self._forget()
            raise

    def expect(self) -> bool:
        """The state of another device is about to come; returns whether that was not so before."""
        new = not self.arriving
        self._server.hold(_ARRIVING)
        return new

    def not_come(self) -> None:
        """It has not come after all."""
        self._server.release(_ARRIVING)

    def take(self) -> None:
        """The state is this device's: from now on its front-end says whether it runs."""
        self._forget()
        for holder in (_ARRIVING, _MOVED):
            self._server.release(holder)

    def _forget(self) -> None:
        if self._marker is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._marker)
