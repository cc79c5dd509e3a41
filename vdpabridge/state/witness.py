"""What a queue says of work: it lies in the guest's memory, and outlives whoever wrote there."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..abi.virtio_ring import VRING_PACKED_DESC, VRING_PACKED_DESC_F_USED, VRING_USED
from ..device import MemoryRegion, SplitBase
from .snapshot import DeviceSnapshot, QueueSnapshot

__all__ = ["Witness"]

_WORD = struct.Struct("<H")


class Witness:
    """Remembers how the stopped queues of ``snapshot`` look in ``regions`` (fds are borrowed)."""

    def __init__(self, snapshot: DeviceSnapshot, regions: Sequence[MemoryRegion]) -> None:
        self._snapshot = snapshot
        self._regions: list[MemoryRegion] = []
        try:
            for region in regions:
                # its own, as the device that has them may be closed before this is asked
                self._regions.append(replace(region, fd=os.dup(region.fd)))
        except OSError:
            self.close()
            raise
        self._before = list(self._look())

    def has_seen_work(self) -> bool:
        """Whether a request was answered since; True also where that cannot be seen."""
        now = list(self._look())
        return now != self._before or None in now

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        regions, self._regions = self._regions, []
        for region in regions:
            os.close(region.fd)

    def _look(self) -> Iterator[int | None]:
        """Of each queue the bits that the next answer changes, and nothing else does; None for unreadable ones."""
        for queue in self._snapshot.queues.values():
            address, bits = _next_answer(queue)
            word = self._read(queue.setup.address_space, address)
            yield None if word is None else word & bits

    def _read(self, address_space: int, address: int) -> int | None:
        for region in self._regions:
            at = address - region.guest_address
            if region.address_space == address_space and 0 <= at <= region.size_bytes - _WORD.size:
                try:
                    (word,) = _WORD.unpack(os.pread(region.fd, _WORD.size, region.offset + at))
                except (OSError, struct.error):
                    return None
                return int(word)
        return None


def _next_answer(queue: QueueSnapshot) -> tuple[int, int]:
    """Address of a word, and its bits that count: of a split ring the used index, which the device alone writes; of a
    packed one the USED flag of the next descriptor, which the driver leaves as it is when it makes that available.

    Source: VIRTIO 1.4, 2.7.8 and 2.8.1.
    """
    if isinstance(queue.base, SplitBase):
        return queue.setup.used_address + VRING_USED.offsets["idx"], 0xFFFF
    descriptor = queue.setup.desc_address + queue.base.used_index * VRING_PACKED_DESC.size_bytes
    return descriptor + VRING_PACKED_DESC.offsets["flags"], 1 << VRING_PACKED_DESC_F_USED
