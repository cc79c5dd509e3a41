"""One ring at work: what it takes, what is in flight, when it is quiet."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum

from .ring import Chain, DeviceRing

__all__ = ["Stopping", "Worker"]


class Stopping(Enum):
    """How much a ring that has to stop still does."""

    NO = "no"
    DRAIN = "drain"
    """The device answers what it has taken, and takes nothing new."""
    NOW = "now"
    """The device leaves what it has taken as it is."""


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
    """What the guest's driver did wrong. The device still answers what it took before."""
    idle: threading.Event = field(default_factory=threading.Event)
    """Set when it is stopping and nothing is left to do."""

    @property
    def ready(self) -> bool:
        """Whether there may be something to take."""
        if self.stopping is Stopping.NO:
            # without a kick eventfd, nobody asks the device to look
            return self.look and self.enabled and self.kick is not None and not self.broken
        return self.stopping is Stopping.DRAIN and bool(self.ring.again) and not self.broken

    def take(self) -> Chain | None:
        """The next chain to be answered. Raises as `DeviceRing.take` does."""
        chain = self.ring.take() if self.stopping is Stopping.NO else self.ring.take_again()
        if chain is None:
            self.look = False
        return chain

    def stop(self, how: Stopping) -> None:
        """Stop, or (NO) continue after all."""
        self.stopping = how
        self.idle.clear()
        self.look = True
        self.check_idle()

    def check_idle(self) -> None:
        """Set `idle` if everything is done."""
        if self.stopping is Stopping.NO:
            return
        left = bool(self.ring.taken) or (bool(self.ring.again) and not self.broken)
        if self.stopping is Stopping.NOW or not left:
            self.idle.set()
