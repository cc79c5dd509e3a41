"""A split virtqueue, device side.

Source: VIRTIO 1.4 section 2.7. The device always asks the driver for notifications and always sends them: both flags
that suppress them are hints, and the device does not offer the suppression that it would have to honour (event
indices).
"""

from __future__ import annotations

from ...abi.virtio_ring import VRING_DESC, VRING_DESC_F_WRITE, VRING_USED_ELEM
from ...device.values import QueueSetup
from ...linux.mappings import store_barrier
from ...rings.byte_order import le16, le32
from ...rings.descriptors import RingBroken, descriptors
from ...rings.guest_view import BadAddress, GuestView
from .inflight import InflightTable

__all__ = ["Chain", "DeviceRing"]

#: The most that one chain may have. A guest's driver that asks for more is hostile.
CHAIN_BYTES_MAX = 32 << 20
_FLAGS = 0
_INDEX = 1  # of the 16-bit words of the available and the used ring
_AVAIL_RING = 2
_USED_RING = 1  # of the used ring's 32-bit words


class Chain:
    """A chain of descriptors that the device has: what to read, and room to answer."""

    __slots__ = ("_guest", "_readable", "_writable", "head", "room_bytes", "written_bytes")

    def __init__(
        self, guest: GuestView, head: int, readable: list[tuple[int, int]], writable: list[tuple[int, int]]
    ) -> None:
        self.head = head
        self._guest = guest
        self._readable = readable
        self._writable = writable
        self.room_bytes = sum(size for _, size in writable)
        """What fits into the answer."""
        self.written_bytes = 0
        """Where the answer ends so far; what the used ring will say."""

    def read(self) -> bytes:
        """All that the driver sent. Raises `BadAddress`."""
        return b"".join(piece for where in self._readable for piece in self._guest.pieces(*where))

    def write(self, data: bytes | memoryview, at: int | None = None) -> None:
        """Answer with ``data``, after what was written before or from offset ``at`` on. Raises `BadAddress`."""
        start = self.written_bytes if at is None else at
        end = start + len(data)
        if end > self.room_bytes:
            raise BadAddress(f"an answer of {end} bytes, and the driver has left room for {self.room_bytes}")
        begin, rest = 0, memoryview(data)
        for address, size in self._writable:
            if rest and begin + size > start:
                skip = max(0, start - begin)
                here = min(size - skip, len(rest))
                place = address + skip
                for piece in self._guest.pieces(place, here, write=True):
                    piece[:] = rest[: len(piece)]
                    rest = rest[len(piece) :]
                    self._guest.written(place, len(piece))
                    place += len(piece)
            begin += size
        self.written_bytes = max(self.written_bytes, end)


class DeviceRing:
    """The ring at ``setup``, continued from ``avail_index``. It notes requests in ``inflight``, if that is given.

    `taken` has the chains that the device has. Everything here raises `RingBroken` for a driver's mistake.
    """

    def __init__(
        self, guest: GuestView, setup: QueueSetup, avail_index: int, inflight: InflightTable | None = None
    ) -> None:
        self._guest = guest
        self._setup = setup
        self._inflight = inflight
        self._generation = -1
        self.avail_index = avail_index
        self.taken: dict[int, Chain] = {}
        self._resolve()
        self.used_index = le16(self._used_words[_INDEX])
        # an earlier device may have asked not to be kicked
        self._used_words[_FLAGS] = 0
        guest.written(setup.used_address, 2)
        self.again: list[int] = []
        """Heads that an earlier device took and did not answer: to be done first."""
        if inflight is not None:
            self.again = inflight.recover(self.used_index)
            if self.again:
                # the base that was kept does not count these
                self.avail_index = (self.used_index + len(self.again)) & 0xFFFF

    @property
    def tracked(self) -> bool:
        """Whether what is in flight is noted where the next device finds it."""
        return self._inflight is not None

    def take_again(self) -> Chain | None:
        """The next chain that an earlier device has left; None if there are no more."""
        self._resolve()
        return self._chain(self.again.pop(0)) if self.again else None

    def take(self) -> Chain | None:
        """The next chain that the driver has made available; None if there is none."""
        if self.again:
            return self.take_again()
        self._resolve()
        store_barrier()
        published = le16(self._avail_words[_INDEX])
        waiting = (published - self.avail_index) & 0xFFFF
        if not waiting:
            return None
        if waiting > self._setup.size:
            raise RingBroken(f"the available index went from {self.avail_index} to {published}")
        store_barrier()  # the index before the entry it publishes
        head = le16(self._avail_words[_AVAIL_RING + self.avail_index % self._setup.size])
        if head in self.taken:
            raise RingBroken(f"chain {head} was made available twice")
        chain = self._chain(head)
        if self._inflight is not None:
            self._inflight.take(head)
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        return chain

    def use(self, chain: Chain) -> None:
        """Give ``chain`` back to the driver, answered."""
        self._resolve()
        size = self._setup.size
        slot = _USED_RING + 2 * (self.used_index % size)
        self._used_longs[slot] = le32(chain.head)
        self._used_longs[slot + 1] = le32(chain.written_bytes)
        if self._inflight is not None:
            self._inflight.about_to_use(chain.head)
        store_barrier()  # the entry before the index that publishes it
        entry = self._setup.used_address + 4 * slot
        self.used_index = (self.used_index + 1) & 0xFFFF
        self._used_words[_INDEX] = le16(self.used_index)
        if self._inflight is not None:
            self._inflight.used(chain.head, self.used_index)
        self._guest.written(entry, VRING_USED_ELEM.size_bytes)
        self._guest.written(self._setup.used_address, 4)
        del self.taken[chain.head]

    def _resolve(self) -> None:
        """Find the ring in memory; again if the mappings have changed."""
        if self._generation == self._guest.generation:
            return
        setup = self._setup
        try:
            self._desc = self._guest.slice(setup.desc_address, VRING_DESC.size_bytes * setup.size)
            self._avail_words = self._guest.slice(setup.avail_address, 4 + 2 * setup.size).cast("H")
            used = self._guest.slice(setup.used_address, 4 + VRING_USED_ELEM.size_bytes * setup.size, write=True)
            self._used_words, self._used_longs = used.cast("H"), used.cast("I")
        except (BadAddress, TypeError) as error:
            raise RingBroken(f"the ring: {error}") from None
        self._generation = self._guest.generation

    def _chain(self, head: int) -> Chain:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        total_bytes = 0
        for address, size, flags in descriptors(self._guest, self._desc, head):
            total_bytes += size
            if total_bytes > CHAIN_BYTES_MAX:
                raise RingBroken(f"chain {head} has {total_bytes} bytes, and more")
            if flags & VRING_DESC_F_WRITE:
                writable.append((address, size))
            elif writable:
                raise RingBroken(f"chain {head} has something to read after something to write")
            else:
                readable.append((address, size))
        chain = Chain(self._guest, head, readable, writable)
        self.taken[head] = chain
        return chain
