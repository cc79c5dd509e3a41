"""A split virtqueue, driver side: what a guest's virtio driver does, in miniature.

Source: VIRTIO 1.4 section 2.7. Neither indirect descriptors nor event indices are used: always kick, always expect a
call.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self

from ..abi.virtio_ring import (
    VRING_AVAIL_ALIGN_SIZE,
    VRING_DESC,
    VRING_DESC_ALIGN_SIZE,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_ALIGN_SIZE,
    VRING_USED_ELEM,
)
from ..device import Device, QueueSetup, SplitBase
from ..errors import DeadlineExceeded, VdpaBridgeError
from ..linux.deadline import Deadline
from ..linux.mappings import store_barrier
from .memory import GuestMemory

__all__ = ["Buffer", "RingError", "SplitQueue"]

#: (guest address, size in bytes)
Buffer = tuple[int, int]

_RING_OFFSET = 4  # past flags and idx, in the available and the used ring alike
# The available ring and both indices are read and written as whole words, so that the device sees either the old or the
# new word: struct.pack_into clears its destination first, and a device that looks in between finds an index of 0.
_INDEX = 1
_RING = 2


class RingError(VdpaBridgeError):
    """The device broke the rules of the ring: it used what it was not given, or used it twice."""


class SplitQueue:
    """A split ring of ``size`` descriptors in ``memory``, with its eventfds. One thread at a time.

    The ring lives in guest memory, so it survives the device: another device can continue it (see `attach`).
    """

    def __init__(self, memory: GuestMemory, size: int) -> None:
        if size & (size - 1) or not 0 < size <= 0x8000:
            raise ValueError(f"a split ring has a power of two of descriptors up to 32768, not {size}")
        self.size = size
        desc = memory.allocate(VRING_DESC.size_bytes * size, VRING_DESC_ALIGN_SIZE)
        avail = memory.allocate(_RING_OFFSET + 2 * size + 2, VRING_AVAIL_ALIGN_SIZE)
        used = memory.allocate(_RING_OFFSET + VRING_USED_ELEM.size_bytes * size + 2, VRING_USED_ALIGN_SIZE)
        self.setup = QueueSetup(size, desc, avail, used)
        self._desc = memory.slice(desc, VRING_DESC.size_bytes * size)
        self._avail = memory.slice(avail, _RING_OFFSET + 2 * size + 2).cast("H")
        self._used = memory.slice(used, _RING_OFFSET + VRING_USED_ELEM.size_bytes * size + 2)
        self._used_words = self._used.cast("H")
        self._free = list(range(size - 1, -1, -1))
        self._chains: dict[int, list[int]] = {}
        """Head -> descriptors of the chains that the device has."""
        self.avail_index = 0
        self.used_index = 0
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def free(self) -> int:
        """Descriptors that the device does not have."""
        return len(self._free)

    @property
    def pending(self) -> int:
        """Chains that the device has not used, as far as `used` has looked."""
        return len(self._chains)

    @property
    def device_used_index(self) -> int:
        """The used index that the device has written, modulo 2^16."""
        return _little_endian(self._used_words[_INDEX])

    def attach(self, device: Device, index: int, base: int = 0, *, address_space: int = 0) -> None:
        """Set queue ``index`` of a configured ``device`` up with this ring, continuing at ``base``, and enable it."""
        device.set_queue(index, replace(self.setup, address_space=address_space))
        device.set_base(index, SplitBase(base))
        device.set_call(index, self.call_fd)
        device.set_kick(index, self.kick_fd)
        device.enable_queue(index)

    def add(self, readable: Sequence[Buffer], writable: Sequence[Buffer] = ()) -> int:
        """Make one chain available and return its head. No kick. Raises ValueError if too few descriptors are free."""
        count = len(readable) + len(writable)
        if not count or count > len(self._free):
            raise ValueError(f"a chain of {count} descriptors, and {len(self._free)} are free")
        chain = [self._free.pop() for _ in range(count)]
        for position, (address, size) in enumerate((*readable, *writable)):
            flags = VRING_DESC_F_WRITE if position >= len(readable) else 0
            following = 0
            if position + 1 < count:
                flags |= VRING_DESC_F_NEXT
                following = chain[position + 1]
            VRING_DESC.struct.pack_into(
                self._desc, chain[position] * VRING_DESC.size_bytes, address, size, flags, following
            )
        head = chain[0]
        self._chains[head] = chain
        self._avail[_RING + self.avail_index % self.size] = _little_endian(head)
        store_barrier()  # the entry before the index that publishes it
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self._avail[_INDEX] = _little_endian(self.avail_index)
        store_barrier()  # the index before the kick
        return head

    def kick(self) -> None:
        """Tell the device to look."""
        os.eventfd_write(self.kick_fd, 1)

    def used(self) -> Iterator[tuple[int, int]]:
        """The chains that the device has used since the last look: (head, bytes written). Frees their descriptors.

        Raises `RingError` for a chain that the device did not have: one that it made up, or used twice.
        """
        while self.used_index != self.device_used_index:
            store_barrier()  # the index before the entry it publishes
            offset = _RING_OFFSET + VRING_USED_ELEM.size_bytes * (self.used_index % self.size)
            head, written = VRING_USED_ELEM.struct.unpack_from(self._used, offset)
            chain = self._chains.pop(head, None)
            if chain is None:
                why = f"used entry {self.used_index} names chain {head}, which the device does not have"
                raise RingError("used ring", why=why, hint="the device made it up or used it twice")
            self._free.extend(reversed(chain))
            self.used_index = (self.used_index + 1) & 0xFFFF
            yield head, written

    def wait(self, deadline: Deadline) -> None:
        """Wait until the device calls. Raises `DeadlineExceeded`."""
        if not deadline.wait({self.call_fd: select.POLLIN}):
            why = f"no call; {self.pending} chains pending"
            raise DeadlineExceeded("wait for used buffers", deadline.timeout_s or 0, why=why)
        os.eventfd_read(self.call_fd)

    def close(self) -> None:
        """Close the eventfds. Idempotent. The ring's memory is the guest's."""
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
            os.close(self.call_fd)
            self.kick_fd = self.call_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<SplitQueue of {self.size}: available {self.avail_index}, used {self.used_index}, {self.pending} pending>"
        )


def _little_endian(word: int) -> int:
    """Convert a 16-bit word to the order that it has in memory, or back: the same exchange both ways."""
    return word if sys.byteorder == "little" else (word & 0xFF) << 8 | word >> 8
