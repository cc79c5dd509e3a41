"""A split ring whose device works on an available and a used ring of ours. The descriptors are the guest's own.

What the guest makes available is copied for the device, and what the device has used is copied for the guest, entry by
entry to the same place: positions mean the same on both sides. Before the guest sees that a chain was used, its pages
are marked in the dirty log, and so the log has every page that the device wrote. The device must not see the guest's
available ring either: there the guest says when it wants to be called, and the relay needs every call.

The whole writable part of a chain is marked: the length in the used ring is only a lower bound (VIRTIO 1.4, 2.7.8.2).
Descriptors are read when a chain was used. A guest that changes them earlier breaks the rules (2.7.13), and deceives
only its own log.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..abi.virtio_ring import VRING_DESC, VRING_DESC_F_WRITE, VRING_USED, VRING_USED_ELEM
from ..device import QueueSetup
from ..linux.mappings import store_barrier
from ..rings.byte_order import le16
from ..rings.descriptors import RingBroken, descriptors
from ..rings.guest_view import BadAddress, GuestView

__all__ = ["RingUnmapped", "ShadowRing"]

_FLAGS = 0
_INDEX = 1  # of the 16-bit words of the available and the used ring
_RING = 2
_MOD = 1 << 16
_ENTRY_BYTES = VRING_USED_ELEM.size_bytes
_ENTRY_WORDS = _ENTRY_BYTES // 2
#: What is published at a time: between two batches others have their turn.
_BATCH = 256
#: The most that one chain may have (VIRTIO 1.4, 2.7.5).
_CHAIN_BYTES_MAX = 1 << 32


class RingUnmapped(RingBroken):
    """The guest's memory does not have the ring now. It continues when it is there again."""


class ShadowRing:
    """Between the guest's ring at ``setup`` and ``avail`` and ``used``, the rings of the device; all are borrowed.

    The device has used everything that it has taken, and stops at `used_index`. ``event_index``: whether
    VIRTIO_RING_F_EVENT_IDX was accepted. Everything here raises `RingBroken` for a driver's mistake, and
    `RingUnmapped` as long as the ring is not in memory.
    """

    def __init__(
        self, guest: GuestView, setup: QueueSetup, avail: memoryview, used: memoryview, *, event_index: bool
    ) -> None:
        self._guest = guest
        self._setup = setup
        self._event_index = event_index
        self._avail = avail.cast("H")
        self._used = used
        self._used_words = used.cast("H")
        self._generation = -1
        self._resolve()
        self.used_index = le16(self._guest_used_words[_INDEX])
        """How many chains the guest knows to be used, modulo 2^16."""
        self.avail_index = self.used_index
        """How many chains the device knows to be available."""
        self.incomplete = ""
        """Why the log does not have every page that the device wrote, if so."""
        self._begin()

    def forward(self) -> bool:
        """Show the device what the guest has made available; whether there was anything."""
        self._resolve()
        published = le16(self._guest_avail[_INDEX])
        count = (published - self.avail_index) % _MOD
        if not count:
            return False
        if count > self._setup.size:
            raise RingBroken(f"the available index went from {self.avail_index} to {published}")
        store_barrier()  # the index before the entries that it publishes
        for start, end in self._spans(self.avail_index, count):
            self._avail[_RING + start : _RING + end] = self._guest_avail[_RING + start : _RING + end]
            # of the copy: the guest may change its own again
            if (most := max(map(le16, self._avail[_RING + start : _RING + end]))) >= self._setup.size:
                raise RingBroken(f"descriptor {most} of a table of {self._setup.size}")
        store_barrier()  # the entries before the index
        self.avail_index = published
        self._avail[_INDEX] = le16(published)
        self._ask_to_be_kicked()
        return True

    def publish(self) -> bool:
        """Mark what the device has written, and show the guest what was used; whether there was anything.

        Raises ValueError if the device says that it has used more than it was given.
        """
        self._resolve()
        count = self.unpublished
        if not count:
            return False
        if count > (self.avail_index - self.used_index) % _MOD:
            index = le16(self._used_words[_INDEX])
            raise ValueError(f"the used index went from {self.used_index} to {index}, of {self.avail_index} available")
        count = min(count, _BATCH)
        index = (self.used_index + count) % _MOD
        store_barrier()  # the index before the entries that it publishes, and before what the device wrote
        spans = list(self._spans(self.used_index, count))
        for start, end in spans:
            first, last = VRING_USED.size_bytes + start * _ENTRY_BYTES, VRING_USED.size_bytes + end * _ENTRY_BYTES
            for head, _ in VRING_USED_ELEM.struct.iter_unpack(self._used[first:last]):
                self._mark(head)
            self._guest_used[first:last] = self._used[first:last]
        store_barrier()  # the entries before the index
        self.used_index = index
        self._guest_used_words[_INDEX] = le16(index)
        for start, end in spans:
            first = VRING_USED.size_bytes + start * _ENTRY_BYTES
            self._written(self._setup.used_address + first, (end - start) * _ENTRY_BYTES)
        self._written(self._setup.used_address, VRING_USED.size_bytes)
        self._ask_to_be_called()
        return True

    @property
    def unpublished(self) -> int:
        """How many chains the device has used that the guest does not know of."""
        return (le16(self._used_words[_INDEX]) - self.used_index) % _MOD

    def _begin(self) -> None:
        """Show the device the guest's rings as they are, but nothing that is available beyond `avail_index`."""
        count = self._setup.size
        self._used[: len(self._guest_used)] = self._guest_used
        self._avail[_RING : _RING + count] = self._guest_avail[_RING : _RING + count]
        self._avail[_INDEX] = le16(self.avail_index)
        self._avail[_FLAGS] = self._used_words[_FLAGS] = 0
        # an earlier device may have asked not to be kicked
        self._guest_used_words[_FLAGS] = 0
        self._written(self._setup.used_address, VRING_USED.size_bytes)
        self._ask_to_be_kicked()
        self._ask_to_be_called()

    def _ask_to_be_kicked(self) -> None:
        """By the guest, when it makes the next chain available."""
        if self._event_index:
            self._guest_used_words[_RING + _ENTRY_WORDS * self._setup.size] = le16(self.avail_index)
            self._written(self._setup.used_address + VRING_USED.size_bytes + _ENTRY_BYTES * self._setup.size, 2)

    def _ask_to_be_called(self) -> None:
        """By the device, when it has used the next chain."""
        if self._event_index:
            self._avail[_RING + self._setup.size] = le16(self.used_index)

    def _mark(self, head: int) -> None:
        size_bytes = 0
        try:
            for address, size, flags in descriptors(self._guest, self._desc, head):
                if flags & VRING_DESC_F_WRITE:
                    size_bytes += size
                    if size_bytes > _CHAIN_BYTES_MAX:
                        raise RingBroken(f"a chain of more than {_CHAIN_BYTES_MAX} bytes")
                    self._written(address, size)
        except RingBroken as error:
            # the device may have understood it otherwise
            self.incomplete = str(error)

    def _written(self, address: int, size_bytes: int) -> None:
        try:
            self._guest.written(address, size_bytes)
        except BadAddress as error:
            self.incomplete = str(error)

    def _spans(self, index: int, count: int) -> Iterator[tuple[int, int]]:
        """(first, end) of the entries for ``count`` indices from ``index`` on: two, if they pass the ring's end."""
        start = index % self._setup.size
        end = min(start + count, self._setup.size)
        yield start, end
        if rest := count - (end - start):
            yield 0, rest

    def _resolve(self) -> None:
        """Find the guest's ring in memory; again if the mappings have changed."""
        if self._generation == self._guest.generation:
            return
        setup, event_bytes = self._setup, 2 if self._event_index else 0
        try:
            self._desc = self._guest.slice(setup.desc_address, VRING_DESC.size_bytes * setup.size)
            self._guest_avail = self._guest.slice(setup.avail_address, 4 + 2 * setup.size + event_bytes).cast("H")
            used_bytes = VRING_USED.size_bytes + _ENTRY_BYTES * setup.size + event_bytes
            self._guest_used = self._guest.slice(setup.used_address, used_bytes, write=True)
            self._guest_used_words = self._guest_used.cast("H")
        except (BadAddress, TypeError) as error:
            raise RingUnmapped(f"the ring: {error}") from None
        self._generation = self._guest.generation
