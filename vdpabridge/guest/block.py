"""virtio-blk requests on a split ring, and a disk whose every block is known.

Source: VIRTIO 1.4 section 5.2.6.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..abi.virtio_blk import (
    SECTOR_BYTES,
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_OUTHDR,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
)
from ..errors import VdpaBridgeError
from ..linux.deadline import Deadline
from .memory import GuestMemory
from .virtqueue import SplitQueue

__all__ = ["BLOCK_BYTES", "BlockDriver", "BlockError", "BlockRequest", "KnownDisk", "block_pattern"]

#: What one request of `KnownDisk` reads or writes.
BLOCK_BYTES = 4096
_BLOCK_SECTORS = BLOCK_BYTES // SECTOR_BYTES
#: Header, data, status.
_DESCRIPTORS = 3
#: A status byte that no device writes: if it is still there, the request was not answered.
_UNANSWERED = 0xFF
_STATUS_NAMES = {VIRTIO_BLK_S_IOERR: "IOERR", VIRTIO_BLK_S_UNSUPP: "UNSUPP", _UNANSWERED: "no status"}
_TYPE_NAMES = {
    VIRTIO_BLK_T_IN: "read",
    VIRTIO_BLK_T_OUT: "write",
    VIRTIO_BLK_T_FLUSH: "flush",
    VIRTIO_BLK_T_GET_ID: "get id",
}


class BlockError(VdpaBridgeError):
    """A request that the device failed, or data that is not what was written."""

    finished: list[BlockRequest]
    """The requests that were found finished at the same time."""


@dataclass(slots=True)
class BlockRequest:
    """A request on its way, or done: then `data` holds what was read."""

    kind: int
    sector: int
    size_bytes: int
    slot: int
    tag: tuple[int, int] = (0, 0)
    """The caller's own; `KnownDisk` keeps (block, generation) there."""
    data: bytes = b""

    def __str__(self) -> str:
        return f"{_TYPE_NAMES.get(self.kind, self.kind)} of {self.size_bytes} bytes at sector {self.sector}"


class BlockDriver:
    """Requests of up to ``data_bytes`` on ``queue``, as many as it has descriptors for. One thread at a time."""

    def __init__(self, memory: GuestMemory, queue: SplitQueue, data_bytes: int = BLOCK_BYTES) -> None:
        self.queue = queue
        self._memory = memory
        self._data_bytes = data_bytes
        self._slots = [
            (memory.allocate(VIRTIO_BLK_OUTHDR.size_bytes), memory.allocate(data_bytes), memory.allocate(1))
            for _ in range(queue.size // _DESCRIPTORS)
        ]
        self._free = list(range(len(self._slots)))
        self._inflight: dict[int, BlockRequest] = {}

    @property
    def capacity(self) -> int:
        """How many requests fit at a time."""
        return len(self._slots)

    @property
    def inflight(self) -> int:
        """Requests submitted and not yet seen done."""
        return len(self._inflight)

    def submit(
        self, kind: int, sector: int = 0, *, data: bytes = b"", read_bytes: int = 0, tag: tuple[int, int] = (0, 0)
    ) -> BlockRequest:
        """Make one request available, without a kick. ValueError if `capacity` requests are in flight."""
        if not self._free or self.queue.free < _DESCRIPTORS:
            raise ValueError(f"{self.inflight} requests are in flight, and no more fit")
        if (size := len(data) or read_bytes) > self._data_bytes:
            raise ValueError(f"a request of {size} bytes, and the driver has room for {self._data_bytes}")
        slot = self._free.pop()
        header, buffer, status = self._slots[slot]
        self._memory.slice(header, VIRTIO_BLK_OUTHDR.size_bytes)[:] = VIRTIO_BLK_OUTHDR.pack(kind, 0, sector)
        self._memory.slice(status, 1)[0] = _UNANSWERED
        self._memory.slice(buffer, len(data))[:] = data
        readable = [(header, VIRTIO_BLK_OUTHDR.size_bytes)] + ([(buffer, len(data))] if data else [])
        writable = ([(buffer, read_bytes)] if read_bytes else []) + [(status, 1)]
        request = BlockRequest(kind, sector, len(data) or read_bytes, slot, tag)
        self._inflight[self.queue.add(readable, writable)] = request
        return request

    def write(self, sector: int, data: bytes, tag: tuple[int, int] = (0, 0)) -> BlockRequest:
        """Submit a write."""
        return self.submit(VIRTIO_BLK_T_OUT, sector, data=data, tag=tag)

    def read(self, sector: int, size_bytes: int, tag: tuple[int, int] = (0, 0)) -> BlockRequest:
        """Submit a read."""
        return self.submit(VIRTIO_BLK_T_IN, sector, read_bytes=size_bytes, tag=tag)

    def flush(self) -> BlockRequest:
        """Submit a flush."""
        return self.submit(VIRTIO_BLK_T_FLUSH)

    def get_id(self) -> BlockRequest:
        """Submit a request for the disk's name."""
        return self.submit(VIRTIO_BLK_T_GET_ID, read_bytes=VIRTIO_BLK_ID_BYTES)

    def done(self) -> list[BlockRequest]:
        """The requests that the device has finished since the last look, without waiting.

        Raises `BlockError` for one that failed, `RingError` for one that was finished twice.
        """
        finished, failed = [], []
        for head, written in self.queue.used():
            request = self._inflight.pop(head)
            self._free.append(request.slot)
            if error := self._take(request, written):
                failed.append(error)
            else:
                finished.append(request)
        if failed:
            failed[0].finished = finished
            raise failed[0]
        return finished

    def _take(self, request: BlockRequest, written: int) -> BlockError | None:
        """Read the answer to ``request``; returns an error if something is wrong with it."""
        _, buffer, status = self._slots[request.slot]
        code = self._memory.slice(status, 1)[0]
        if code != VIRTIO_BLK_S_OK:
            return BlockError(str(request), why=f"the device answered {_STATUS_NAMES.get(code, code)}")
        reads = request.kind in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_GET_ID)
        if written != 1 + (request.size_bytes if reads else 0):
            return BlockError(str(request), why=f"the device says that it wrote {written} bytes")
        if reads:
            request.data = bytes(self._memory.slice(buffer, request.size_bytes))
        return None

    def drain(self, timeout_s: float = 10.0) -> list[BlockRequest]:
        """Kick, and wait until nothing is in flight. Raises `DeadlineExceeded`, and as `done` does."""
        deadline = Deadline(timeout_s)
        self.queue.kick()
        finished = self.done()
        while self._inflight:
            self.queue.wait(deadline)
            finished += self.done()
        return finished


def block_pattern(block: int, generation: int) -> bytes:
    """What block number ``block`` holds after its ``generation``-th write: every 16 bytes tell both."""
    return struct.pack("<QQ", block, generation) * (BLOCK_BYTES // 16)


@dataclass(slots=True)
class KnownDisk:
    """The first blocks of a disk, with what each must hold: writes are remembered, reads are checked.

    A block has at most one request in flight, so there is no doubt about which write came last.
    """

    driver: BlockDriver
    generations: dict[int, int] = field(default_factory=dict)
    """Block -> number of writes that the device has confirmed."""
    busy: set[int] = field(default_factory=set)
    """Blocks that have a request in flight."""
    writes_confirmed: int = 0
    reads_verified: int = 0

    def write(self, block: int) -> None:
        """Submit the next generation of ``block``."""
        self._claim(block)
        generation = self.generations.get(block, 0) + 1
        self.driver.write(block * _BLOCK_SECTORS, block_pattern(block, generation), tag=(block, generation))

    def read(self, block: int) -> None:
        """Submit a read of ``block``, which must have been written."""
        self._claim(block)
        self.driver.read(block * _BLOCK_SECTORS, BLOCK_BYTES, tag=(block, self.generations[block]))

    def settle(self, requests: Iterable[BlockRequest]) -> None:
        """Handle finished requests: remember writes, check reads. Raises `BlockError` for wrong data."""
        for request in requests:
            if request.kind not in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT):
                continue
            block, generation = request.tag
            self.busy.discard(block)
            if request.kind == VIRTIO_BLK_T_OUT:
                self.generations[block] = generation
                self.writes_confirmed += 1
            elif request.data != block_pattern(block, generation):
                found = struct.unpack_from("<QQ", request.data)
                why = f"expected block {block} generation {generation}, found block {found[0]} generation {found[1]}"
                raise BlockError(str(request), why=why)
            else:
                self.reads_verified += 1

    def verify(self, timeout_s: float = 30.0) -> int:
        """Read every block that was ever written and check it; returns how many."""
        self.settle(self.driver.drain(timeout_s))
        waiting = sorted(self.generations)
        count = len(waiting)
        while waiting:
            batch, waiting = waiting[: self.driver.capacity], waiting[self.driver.capacity :]
            for block in batch:
                self.read(block)
            self.settle(self.driver.drain(timeout_s))
        return count

    def _claim(self, block: int) -> None:
        if block in self.busy:
            raise ValueError(f"block {block} has a request in flight")
        self.busy.add(block)
