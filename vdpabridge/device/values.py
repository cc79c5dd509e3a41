"""The values of the device interface: regions, queues, parts of a snapshot, in neutral terms and guest addresses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from ..abi.virtio_ring import packed_ring_bytes, split_ring_bytes
from ..abi.vring_base import QueueBase
from .rules import Operation

__all__ = [
    "DirtyLog",
    "Identity",
    "InflightRegion",
    "MemoryRegion",
    "QueueRecord",
    "QueueSetup",
    "StateDirection",
    "StatePhase",
]


class StateDirection(IntEnum):
    """Which way device state goes; the numbers are vhost-user's."""

    SAVE = 0
    """From the device to the caller."""
    LOAD = 1
    """From the caller to the device."""


class StatePhase(IntEnum):
    """At which point of a migration state is transferred; the numbers are vhost-user's."""

    STOPPED = 0
    """The guest and the device are stopped. The only phase so far."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a device is; fixed for its life."""

    device_id: int | None
    """Virtio device id; None if neither transport nor caller knows it."""
    queue_count: int
    queue_size_max: int
    config_size_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Guest memory: ``size_bytes`` of file ``fd`` from ``offset``, seen by the guest at ``guest_address``."""

    guest_address: int
    size_bytes: int
    fd: int
    """Borrowed for the duration of a call; a `Device` keeps a duplicate for as long as the region is mapped."""
    offset: int = 0
    writable: bool = True
    address_space: int = 0
    """For devices whose queues can see different memory; 0 if there is only one."""


@dataclass(frozen=True, slots=True)
class QueueSetup:
    """Where a virtqueue lies in guest memory. ``size`` counts descriptors."""

    size: int
    desc_address: int
    avail_address: int
    used_address: int
    address_space: int = 0
    """The address space that the queue and its buffers are in, if the device has more than one."""

    def parts(self, *, packed: bool) -> list[tuple[int, int]]:
        """(guest address, bytes) of each of the three parts of the ring."""
        sizes = (packed_ring_bytes if packed else split_ring_bytes)(self.size)
        return list(zip((self.desc_address, self.avail_address, self.used_address), sizes, strict=True))


@dataclass(frozen=True, slots=True)
class DirtyLog:
    """A bitmap, one bit for each 4 KiB page of guest memory that the device wrote. ``fd`` is borrowed."""

    fd: int
    size_bytes: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class InflightRegion:
    """Shared memory in which a device records the requests it has taken but not answered; calls say who owns ``fd``."""

    fd: int
    size_bytes: int
    offset: int
    queue_count: int
    queue_size: int


@dataclass(slots=True)
class QueueRecord:
    """What a queue was told since the last reset; kept so that it can be sent again. Its eventfds are duplicates."""

    setup: QueueSetup | None = None
    base: QueueBase | None = None
    enabled: bool = False
    eventfds: dict[Operation, int] = field(default_factory=dict)
    """SET_KICK, SET_CALL or SET_ERR -> descriptor, owned by the device."""
