"""Whether the state that a device has is the guest's, or belongs to another device: then the device is held.

A move has two moments at which two devices have the same state. The source has given its state away when a mover says
`moved`: it is held from then on. The destination has got it before that: it is held until the mover says `arrived`. A
mover that dies at any point leaves at most one device that can run.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..device import Device, RunState
from ..errors import VdpaBridgeError
from ..export.vhost_user.server import Server
from . import markers
from .moves import REFUSALS, Fate, Moves

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
        self._moves = Moves()
        self._outgoing: str | None = None
        """The move that the state has left by."""
        self._incoming: str | None = None
        """The move that the state has come by."""
        self._coming: str | None = None
        """The move whose state is under way."""
        self._mover: object = None
        """Who has brought the state that is arriving, as long as he is connected."""
        self._version: int | None = None
        """The device's `state_version` with the state that was moved; None if this process has not seen it."""
        self._arrived: int | None = None
        """The same of a state that has arrived."""
        self._remember()

    def _remember(self) -> None:
        """Hold the device as the process before has held it."""
        if self._path is None:
            return
        for holder, fate in ((_MOVED, Fate.MOVED), (_ARRIVING, Fate.CAME)):
            path = f"{self._path}.{holder}"
            if markers.is_there(path):
                self._server.hold(holder)
                for move in markers.moves_in(path):
                    self._moves.note(move, fate)
                    if fate is Fate.MOVED:
                        self._outgoing = move
                    else:
                        self._incoming = move

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
        return (self.moved or self.arriving) and self._coming is None and self._version != self._device.state_version

    @property
    def arrived(self) -> bool:
        """Whether the device has the state of another device, and it is this one's now."""
        return self._arrived == self._device.state_version

    @property
    def fates(self) -> dict[str, Fate]:
        """What became of the last moves that the device took part in, by name; oldest first."""
        return {move: self._fate(move) for move in self._moves.names()}

    def _fate(self, move: str) -> Fate:
        fate = self._moves[move]
        gone = fate is Fate.CAME and (move != self._incoming or self._version != self._device.state_version)
        return Fate.LOST if gone else fate

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
            by = f"--move {self._incoming}" if self._incoming else "--force"
            hint = f"if that one was \"moved\", or its process has ended for good: 'vdpabridge resume {by}'"
        elif self.moved:
            why = "its state was moved to another device; if both run, the guest's data is destroyed"
            hint = "'vdpabridge resume --force', if the other device does not run and never will"
        else:
            return
        raise VdpaBridgeError(what, device=self._device.name, why=why, hint=hint)

    def require_here(self, move: str) -> None:
        """Raise if the device does not have the state of ``move``, or may not be started with it by its user."""
        fate = self._fate(move) if move in self._moves else None
        if fate is Fate.ARRIVED:
            self.require("resume")
            return
        why, hint = REFUSALS.get(fate, ("the client that moves the state of {} is still connected", "end it first"))
        if fate is not Fate.CAME or self._mover is not None:
            raise VdpaBridgeError("resume", device=self._device.name, why=why.format(move), hint=hint)

    def give_away(self, move: str) -> None:
        """The state is another device's from now on. Raises OSError, or what suspending raises: then it is not."""
        self._hold(_MOVED, [move])
        self._moves.note(move, Fate.MOVED)
        self._outgoing, self._version, self._arrived = move, self._device.state_version, None

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

    def require_new(self, move: str, what: str) -> None:
        """Raise if ``move`` names a move that the device took part in before."""
        if move in self._moves:
            why, hint = f"it knows move {move} already", "give each move a name of its own"
            raise VdpaBridgeError(what, device=self._device.name, why=why, hint=hint)

    def expect(self, move: str) -> bool:
        """The state of another device is about to come; returns whether that was not so before. Raises as
        `give_away`."""
        new = not self.arriving
        before = [self._incoming] if self._incoming is not None and not new else []
        self._hold(_ARRIVING, [*before, move])
        self._moves.note(move, Fate.COMING)
        self._coming = move
        return new

    def came(self, mover: object) -> None:
        """``mover`` has brought it. A reset, or another load, loses it."""
        self._moves.note(self._coming, Fate.CAME)
        self._mover, self._version = mover, self._device.state_version
        self._incoming, self._coming = self._coming, None

    def not_come(self, *, new: bool) -> None:
        """It has not come after all. ``new``: what `expect` returned."""
        if self._coming is not None:
            self._moves.drop(self._coming)
        self._coming = None
        if new:
            self._forget(_ARRIVING)
            self._server.release(_ARRIVING)

    def left(self, client: object) -> None:
        """``client`` has left. If it was the mover, nobody can say any more that the state has arrived."""
        if self._mover is client:
            self._mover = None

    def is_done(self, move: str) -> bool:
        """Whether ``move`` has brought state that has arrived: said before, perhaps with an answer that got lost."""
        return move in self._moves and self._moves[move] is Fate.ARRIVED

    def require_brought(self, mover: object, move: str) -> None:
        """Raise if the state is not the one that ``mover`` has brought by ``move``, or is not there any more."""
        if not self.arriving or self._mover is not mover or self._incoming != move:
            why, hint = f"this client has brought no state by move {move}", "'vdpabridge status' says what it has"
            raise VdpaBridgeError("arrived", device=self._device.name, why=why, hint=hint)
        if self.lost:
            why = "after the state had come, the device was reset or was given other state: it has lost it"
            raise VdpaBridgeError("arrived", device=self._device.name, why=why)

    def take(self) -> None:
        """The state is this device's: from now on its front-end says whether it runs."""
        self._forget_both()
        # only now: a file that stays holds the process that comes after
        if self.arriving:
            self._moves.note(self._incoming, Fate.GIVEN_UP if self.lost else Fate.ARRIVED)
            self._arrived = self._version
        elif self.moved:
            self._moves.note(self._outgoing, Fate.TAKEN_BACK)
        self._let_go()

    def replace(self) -> None:
        """The device was given state that is no other device's, instead of what came or has left."""
        self._forget_both()
        if self.arriving:
            self._moves.note(self._incoming, Fate.GIVEN_UP)
        self._let_go()

    def _forget_both(self) -> None:
        for holder in (_ARRIVING, _MOVED):
            if self._server.holds(holder):
                self._forget(holder)

    def _let_go(self) -> None:
        self._mover = None
        for holder in (_ARRIVING, _MOVED):
            self._server.release(holder)

    def _hold(self, holder: str, moves: Sequence[str]) -> None:
        # first the file: a process that ends behind it has not said anything yet
        written = self._path is not None and markers.write(f"{self._path}.{holder}", _TEXTS[holder], moves)
        try:
            self._server.hold(holder)
        except BaseException:
            if written:
                self._forget(holder)
            raise

    def _forget(self, holder: str) -> None:
        if self._path is not None:
            markers.forget(f"{self._path}.{holder}")
