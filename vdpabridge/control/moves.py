"""What became of each move of device state, as the device that takes part in it knows it."""

from __future__ import annotations

from enum import Enum

__all__ = ["REFUSALS", "Fate", "Moves"]


class Fate(Enum):
    """What became of the state that a move carries, as one of its two devices sees it. Each is a positive fact."""

    COMING = "coming"
    CAME = "came"
    """It is here; nobody has said yet that the device it came from does not run."""
    ARRIVED = "arrived"
    """It was this device's from then on: the move is done, whatever the device has done since."""
    LOST = "lost"
    """It came, and is not here any more: before it arrived, the device was reset or was given other state."""
    GIVEN_UP = "given up"
    """It was lost, and the device was allowed to start without it."""
    MOVED = "moved"
    """It has left this device."""
    TAKEN_BACK = "taken back"
    """It had left this device, which was allowed to start with it all the same."""


#: Why a device is not started with the state of a move, and what to do, by the move's fate; None: it is not known.
REFUSALS: dict[Fate | None, tuple[str, str]] = {
    None: (
        "it knows nothing of move {}",
        "if a guest may have worked with this device since, the one that the state is from must not run; if none has, "
        "end this process for good before 'vdpabridge resume --force' of that one",
    ),
    Fate.COMING: ("the state of move {} is on its way", "try again when it has come"),
    Fate.LOST: (
        "the state of move {} came, and is lost: the device was reset or was given other state",
        "'vdpabridge resume --force' of the device that it came from goes back to it",
    ),
    Fate.GIVEN_UP: (
        "the device was started without the state of move {}",
        "the device that the state is from must not run as long as this one may",
    ),
    Fate.MOVED: (
        "move {} has taken the state of this device away",
        "'vdpabridge resume --force', if the other device does not run and never will",
    ),
    Fate.TAKEN_BACK: ("move {} has taken its state away, and that was taken back", "leave --move away"),
}
#: So many moves are remembered. Older ones are of no use to anybody who has had no answer.
_REMEMBERED = 16


class Moves:
    """The last moves that a device took part in, oldest first."""

    def __init__(self) -> None:
        self._fates: dict[str, Fate] = {}

    def __contains__(self, move: str) -> bool:
        return move in self._fates

    def __getitem__(self, move: str) -> Fate:
        return self._fates[move]

    def note(self, move: str | None, fate: Fate) -> None:
        """``fate`` is what became of ``move``; None is a move without a name, of which nothing is remembered."""
        if move is None:
            return
        self._fates[move] = fate
        while len(self._fates) > _REMEMBERED:
            del self._fates[next(iter(self._fates))]

    def drop(self, move: str) -> None:
        """``move`` has not taken place."""
        self._fates.pop(move, None)

    def names(self) -> list[str]:
        """The moves that are remembered."""
        return list(self._fates)
