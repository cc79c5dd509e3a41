"""The in-flight region of a queue, kept so that requests outlive the process that took them.

Source: docs/interop/vhost-user.rst, "Inflight I/O tracking". This module follows its steps exactly: between any two
writes, a process that reads the region can find out what became of every request.
"""

from __future__ import annotations

from ...abi.inflight import DESC_STATE_SPLIT, QUEUE_REGION_SPLIT, VERSION
from ...linux.mappings import store_barrier

__all__ = ["InflightTable"]

_INFLIGHT = DESC_STATE_SPLIT.offsets["inflight"]
_NEXT = DESC_STATE_SPLIT.offsets["next"]
_COUNTER = DESC_STATE_SPLIT.offsets["counter"]
_LAST_BATCH_HEAD = QUEUE_REGION_SPLIT.offsets["last_batch_head"] // 2
_USED_INDEX = QUEUE_REGION_SPLIT.offsets["used_idx"] // 2


class InflightTable:
    """One queue's part of the region, seen through ``view`` (borrowed). Words are written whole."""

    def __init__(self, view: memoryview, queue_size: int) -> None:
        self._bytes = view
        self._words = view[: len(view) // 8 * 8].cast("H")
        self._longs = view[: len(view) // 8 * 8].cast("Q")
        self._size = queue_size
        self._room = (len(view) - QUEUE_REGION_SPLIT.size_bytes) // DESC_STATE_SPLIT.size_bytes
        self._counter = 0

    def recover(self, used_index: int) -> list[int]:
        """The heads that were taken and never used, oldest first. ``used_index`` is the ring's.

        A fresh region is initialised, and has none; the same goes for a region of a ring of another size with none
        left. Raises ValueError for a region of another version, or of another ring.
        """
        features, version, size, last_head, noted_used = QUEUE_REGION_SPLIT.unpack(self._bytes)
        if version not in (0, VERSION):
            raise ValueError(f"an in-flight region of version {version}, not {VERSION}")
        if size > self._room or last_head >= self._room:
            raise ValueError(f"an in-flight region of {size} descriptors, in {len(self._bytes)} bytes")
        if version == 0 or size != self._size:
            if any(self._bytes[self._at(head) + _INFLIGHT] for head in range(size)):
                raise ValueError(f"an in-flight region of a ring of {size} descriptors, and this has {self._size}")
            fresh = QUEUE_REGION_SPLIT.pack(features, VERSION, self._size, 0, used_index)
            self._bytes[: len(fresh)] = fresh
            return []
        if noted_used != used_index:
            # the earlier process died after it published the used index, of one chain or of a batch, and before it
            # noted that
            head = last_head
            for _ in range(min((used_index - noted_used) & 0xFFFF, self._size)):
                self._bytes[self._at(head) + _INFLIGHT] = 0
                head = min(self._words[(self._at(head) + _NEXT) // 2], self._room - 1)
            self._words[_USED_INDEX] = used_index
        taken = [head for head in range(self._size) if self._bytes[self._at(head) + _INFLIGHT]]
        taken.sort(key=self._counter_of)
        self._counter = 1 + max(map(self._counter_of, taken), default=0)
        return taken

    def take(self, head: int) -> None:
        """Note that the chain at ``head`` was taken from the ring; call this before working on it."""
        self._longs[(self._at(head) + _COUNTER) // 8] = self._counter
        self._counter += 1
        store_barrier()
        self._bytes[self._at(head) + _INFLIGHT] = 1
        store_barrier()

    def about_to_use(self, head: int) -> None:
        """Note which chain comes next in the used ring; call this before publishing its index."""
        self._words[(self._at(head) + _NEXT) // 2] = self._words[_LAST_BATCH_HEAD]
        self._words[_LAST_BATCH_HEAD] = head
        store_barrier()

    def used(self, head: int, used_index: int) -> None:
        """Note that the chain at ``head`` is the driver's again; call this after publishing the used index."""
        store_barrier()
        self._bytes[self._at(head) + _INFLIGHT] = 0
        store_barrier()
        self._words[_USED_INDEX] = used_index

    @staticmethod
    def _at(head: int) -> int:
        return QUEUE_REGION_SPLIT.size_bytes + DESC_STATE_SPLIT.size_bytes * head

    def _counter_of(self, head: int) -> int:
        return self._longs[(self._at(head) + _COUNTER) // 8]
