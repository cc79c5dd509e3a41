"""What a queue shows of a device's work: it lies in the guest's memory, and outlives the device."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from ...abi.virtio_ring import VRING_PACKED_DESC, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_USED
from ...device import MemoryRegion, PackedBase
from ..snapshot import DeviceSnapshot, QueueSnapshot

__all__ = ["Evidence", "Witness"]

_WORD = struct.Struct("<H")
_AVAIL, _USED = 1 << VRING_PACKED_DESC_F_AVAIL, 1 << VRING_PACKED_DESC_F_USED
_BOTH = _AVAIL | _USED


class Evidence(Enum):
    """What is known about work that was done since a snapshot."""

    NONE = "no request was answered"
    WORK = "a request was answered"
    UNREADABLE = "its rings cannot be read"


class Witness:
    """Remembers how the stopped queues of ``snapshot`` look in ``regions`` (fds are borrowed)."""

    def __init__(self, snapshot: DeviceSnapshot, regions: Sequence[MemoryRegion]) -> None:
        self._queues = list(snapshot.queues.values())
        self._regions: list[MemoryRegion] = []
        try:
            for region in regions:
                # duplicates: the device that has the descriptors may be closed before this is asked
                self._regions.append(replace(region, fd=os.dup(region.fd)))
            self._before = [self._look(queue) for queue in self._queues]
        except BaseException:
            self.close()
            raise

    def evidence(self) -> Evidence:
        """What the queues show now. Work on one queue counts, whatever the others show."""
        pairs = [(queue, before, self._look(queue)) for queue, before in zip(self._queues, self._before, strict=True)]
        if any(_tells_of_work(*pair) for pair in pairs):
            return Evidence.WORK
        unreadable = any(before is None or now is None for _, before, now in pairs)
        return Evidence.UNREADABLE if unreadable else Evidence.NONE

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        regions, self._regions = self._regions, []
        for region in regions:
            os.close(region.fd)

    def _look(self, queue: QueueSnapshot) -> bytes | None:
        """What an answer on ``queue`` changes; None if it cannot be read."""
        address, size = _telling_part(queue)
        for region in self._regions:
            at = address - region.guest_address
            if region.address_space == queue.setup.address_space and 0 <= at <= region.size_bytes - size:
                try:
                    data = os.pread(region.fd, size, region.offset + at)
                except OSError:
                    return None
                return data if len(data) == size else None
        return None


def _telling_part(queue: QueueSnapshot) -> tuple[int, int]:
    """(address, bytes) of what shows an answer: in a split ring the used index, which only the device writes; in a
    packed ring all descriptors, whose flags both sides write.

    Source: VIRTIO 1.4, 2.7.8 and 2.8.1.
    """
    if isinstance(queue.base, PackedBase):
        return queue.setup.desc_address, VRING_PACKED_DESC.size_bytes * queue.setup.size
    return queue.setup.used_address + VRING_USED.offsets["idx"], _WORD.size


def _tells_of_work(queue: QueueSnapshot, before: bytes | None, now: bytes | None) -> bool:
    if before is None or now is None or before == now:
        return False
    if not isinstance(queue.base, PackedBase):
        return True
    return not _made_by_the_guest(queue.base, _bits(before), _bits(now))


def _bits(descriptors: bytes) -> list[int]:
    flags = VRING_PACKED_DESC.offsets["flags"]
    step = VRING_PACKED_DESC.size_bytes
    return [_WORD.unpack_from(descriptors, at + flags)[0] & _BOTH for at in range(0, len(descriptors), step)]


def _made_by_the_guest(base: PackedBase, before: list[int], now: list[int]) -> bool:
    """Whether the guest alone can have changed the flags from ``before`` to ``now``: it makes the free descriptors
    available, one after the other from the available index on, and touches no others.

    After more than one round of the whole ring some rings look as before; that cannot be told from no work.
    """
    size = len(now)
    full = (base.avail_index, base.avail_wrap) != (base.used_index, base.used_wrap)
    taken = (base.avail_index - base.used_index) % size or (size if full else 0)
    wrap = base.avail_wrap
    more = True
    order = [(base.avail_index + step) % size for step in range(size)]
    for step, index in enumerate(order):
        if index == 0 and step:
            wrap = not wrap
        available = (_AVAIL if wrap else 0) | (0 if wrap else _USED)
        more = more and step < size - taken and now[index] == available
        if not more and now[index] != before[index]:
            return False
    return True
