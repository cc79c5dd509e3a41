"""One ring at work: what it takes, what is in flight, when it is quiet."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum

from .ring import Chain, DeviceRing

__all__ = ["Stopping", "Worker"]


class Stopping(Enum):
    """How far a ring that is to stop still goes on."""

    NO = "no"
    DRAIN = "drain"
    """What the device has taken is answered, and nothing new is taken."""
    NOW = "now"
    """What the device has taken is left where it is."""


@dataclass(slots=True)
class Worker:
    """A ring at work. Its eventfds are borrowed."""

    ring: DeviceRing
    kick: int | None = None
    call: int | None = None
    err: int | None = None
    enabled: bool = True
    stopping: Stopping = Stopping.NO
    look: bool = True
    """A kick came, or may have come."""
    broken: str = ""
    """What the driver did wrong. What was taken before is answered still."""
    idle: threading.Event = field(default_factory=threading.Event)
    """Set when it is stopping and there is nothing more to be done for it."""

    @property
    def ready(self) -> bool:
        """Whether there may be something to take."""
        if self.stopping is Stopping.NO:
            # without a kick nobody has asked for it to be looked into
            return self.look and self.enabled and self.kick is not None and not self.broken
        return self.stopping is Stopping.DRAIN and bool(self.ring.again) and not self.broken

    def take(self) -> Chain | None:
        """The next chain to be answered. Raises as `DeviceRing.take` does."""
        chain = self.ring.take() if self.stopping is Stopping.NO else self.ring.take_again()
        if chain is None:
            self.look = False
        return chain

    def stop(self, how: Stopping) -> None:
        """Stop, or (NO) go on after all."""
        self.stopping = how
        self.idle.clear()
        self.look = True
        self.check_idle()

    def check_idle(self) -> None:
        """Note that all is done, where it is."""
        if self.stopping is Stopping.NO:
            return
        left = bool(self.ring.taken) or (bool(self.ring.again) and not self.broken)
        if self.stopping is Stopping.NOW or not left:
            self.idle.set()
