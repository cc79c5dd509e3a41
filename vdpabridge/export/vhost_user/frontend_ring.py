"""One ring as a front-end describes it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ...abi.vhost_user_payloads import VringAddr
from ...device import Operation, QueueBase, QueueSetup, decode_base
from ...errors import VdpaBridgeError
from .frontend_memory import FrontendMemory

__all__ = ["FrontendRing"]


@dataclass(slots=True)
class FrontendRing:
    """What the front-end has said about ring ``index``, and what the device knows of it. Owns its eventfds."""

    index: int
    size: int = 0
    address: VringAddr | None = None
    base_word: int | None = None
    """Its position, as in GET_VRING_BASE and SET_VRING_BASE."""
    eventfds: dict[Operation, int] = field(default_factory=dict)
    started: bool = False
    """Whether SET_VRING_KICK came, and no GET_VRING_BASE since."""
    enabled: bool = False
    enable_known: bool = False
    """Whether `enabled` is what the front-end has said, since the ring was last stopped and disabled."""
    in_device: bool = False
    """Whether the running device has it."""
    installed: QueueSetup | None = None
    """The size and addresses that the device was given."""

    @property
    def described(self) -> bool:
        """Whether the front-end has given its size and addresses."""
        return self.address is not None and self.size > 0

    def setup(self, memory: FrontendMemory, address: VringAddr | None = None) -> QueueSetup:
        """The ring in guest addresses; with ``address``, as if it were there.

        Raises `VdpaBridgeError` if it was not described, or is not in ``memory``.
        """
        where = address or self.address
        if where is None or not self.size:
            raise VdpaBridgeError(f"queue {self.index}", why="it was kicked before its size and addresses were set")
        desc, avail, used = (memory.guest_address(each) for each in (where.desc, where.avail, where.used))
        return QueueSetup(self.size, desc, avail, used)

    def base(self, *, packed: bool) -> QueueBase:
        """Its position. A packed ring begins with both wrap counters set."""
        initial = 1 << 15 | 1 << 31 if packed else 0
        return decode_base(initial if self.base_word is None else self.base_word, packed=packed)

    def keep(self, operation: Operation, fd: int | None) -> None:
        """Take ownership of ``fd`` (None: nothing), the eventfd that ``operation`` sets, and close the previous one."""
        if (old := self.eventfds.pop(operation, None)) is not None:
            os.close(old)
        if fd is not None:
            self.eventfds[operation] = fd

    def forget(self) -> None:
        """After a reset: it is stopped and disabled, at its beginning. The call and error descriptors stay."""
        self.started = self.enabled = self.enable_known = self.in_device = False
        self.base_word = None
        self.keep(Operation.SET_KICK, None)

    def close(self) -> None:
        """Close the eventfds. Idempotent."""
        for operation in list(self.eventfds):
            self.keep(operation, None)
