"""A virtio-blk disk: in memory, or a file.

Source: VIRTIO 1.4 section 5.2.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from ...abi.virtio import VIRTIO_ID_BLOCK
from ...abi.virtio_blk import (
    SECTOR_BYTES,
    VIRTIO_BLK_CONFIG,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
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
from ...linux.mappings import memory_file
from .model import Loaded, Model, StateRefused, parsed_facts
from .ring import Chain
from .stream import CHUNK_BYTES_MAX

__all__ = ["BlockModel"]

_FEATURES = (
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_MQ,
)
_NAME = b"vdpabridge-sim"
_SEGMENTS_MAX = 126
_WRITEBACK = VIRTIO_BLK_CONFIG.offsets["wce"]
#: Where an extent of a memory disk begins; its content follows.
_EXTENT = struct.Struct("<Q")


class BlockModel(Model):
    """A disk in ``fd`` (takes ownership): a regular file, or a memfd whose content is then part of the state."""

    device_id = VIRTIO_ID_BLOCK

    def __init__(self, fd: int, *, in_memory: bool, read_only: bool = False, queue_count: int = 2) -> None:
        self._fd = fd
        self._in_memory = in_memory
        # by seeking to its end, which block devices can do as well
        self._size_bytes = os.lseek(fd, 0, os.SEEK_END) // SECTOR_BYTES * SECTOR_BYTES
        self._read_only = read_only
        self._writeback = True
        self.queue_count = queue_count
        self.features = sum(1 << bit for bit in _FEATURES) | read_only << VIRTIO_BLK_F_RO

    @classmethod
    def in_memory(cls, size_bytes: int, *, queue_count: int = 2) -> BlockModel:
        """A disk of zeros."""
        return cls(memory_file("vdpabridge-disk", size_bytes), in_memory=True, queue_count=queue_count)

    @classmethod
    def of_file(cls, path: str, *, read_only: bool = False, queue_count: int = 2) -> BlockModel:
        """The disk in file ``path``. Raises OSError as open(2) does."""
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        model = cls(fd, in_memory=False, read_only=read_only, queue_count=queue_count)
        if not model._size_bytes:
            model.close()
            raise ValueError(f"{path} has no whole sector: it is empty, or not a disk")
        return model

    # --- configuration space ---

    def config(self) -> bytes:
        values = dict.fromkeys(VIRTIO_BLK_CONFIG.fields, 0) | {
            "capacity": self._size_bytes // SECTOR_BYTES,
            "seg_max": _SEGMENTS_MAX,
            "blk_size": SECTOR_BYTES,
            "wce": int(self._writeback),
            "num_queues": self.queue_count,
        }
        spare: dict[str, Any] = {"unused1": b"", "zoned.unused2": b""}
        return VIRTIO_BLK_CONFIG.pack(*(values | spare).values())

    def write_config(self, offset: int, data: bytes) -> bool:
        if not offset <= _WRITEBACK < offset + len(data):
            return False
        before, self._writeback = self._writeback, bool(data[_WRITEBACK - offset])
        return before != self._writeback

    # --- requests ---

    def handle(self, chain: Chain, *, fail: bool) -> None:
        request = chain.read()
        if len(request) < VIRTIO_BLK_OUTHDR.size_bytes or not chain.room_bytes:
            chain.written_bytes = 0
            return
        kind, _, sector = VIRTIO_BLK_OUTHDR.unpack(request)
        status = VIRTIO_BLK_S_IOERR if fail else self._perform(kind, sector * SECTOR_BYTES, request, chain)
        # the status is the last byte of the writable room, wherever the data ends
        chain.write(bytes([status]), chain.room_bytes - 1)
        if status != VIRTIO_BLK_S_OK:
            chain.written_bytes = 1

    def _perform(self, kind: int, offset: int, request: bytes, chain: Chain) -> int:
        data = memoryview(request)[VIRTIO_BLK_OUTHDR.size_bytes :]
        room = chain.room_bytes - 1
        try:
            if kind == VIRTIO_BLK_T_IN and self._is_there(offset, room):
                content = os.pread(self._fd, room, offset)
                chain.write(content)
                if len(content) < room:
                    return VIRTIO_BLK_S_IOERR
            elif kind == VIRTIO_BLK_T_OUT and self._is_there(offset, len(data)):
                if os.pwrite(self._fd, data, offset) < len(data):
                    return VIRTIO_BLK_S_IOERR
                if not self._writeback:
                    os.fdatasync(self._fd)
            elif kind == VIRTIO_BLK_T_FLUSH:
                os.fdatasync(self._fd)
            elif kind == VIRTIO_BLK_T_GET_ID:
                chain.write(_NAME.ljust(VIRTIO_BLK_ID_BYTES, b"\0")[:room])
            else:
                return VIRTIO_BLK_S_IOERR if kind in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT) else VIRTIO_BLK_S_UNSUPP
        except OSError:
            return VIRTIO_BLK_S_IOERR
        return VIRTIO_BLK_S_OK

    def _is_there(self, offset: int, size_bytes: int) -> bool:
        return offset + size_bytes <= self._size_bytes and size_bytes % SECTOR_BYTES == 0

    # --- state ---

    def save(self) -> Iterator[bytes]:
        facts = {"size_bytes": self._size_bytes, "writeback": self._writeback, "in_memory": self._in_memory}
        yield json.dumps(facts).encode()
        if not self._in_memory:
            return
        for begin, end in _data_extents(self._fd, self._size_bytes):
            step = CHUNK_BYTES_MAX - _EXTENT.size
            for at in range(begin, end, step):
                yield _EXTENT.pack(at) + os.pread(self._fd, min(step, end - at), at)

    def load(self, chunks: Iterable[bytes]) -> Loaded:
        content = iter(chunks)
        facts = parsed_facts(next(content, b""))
        for what, mine in (("size_bytes", self._size_bytes), ("in_memory", self._in_memory)):
            if facts.get(what) != mine:
                raise StateRefused(f"its disk has {what} {facts.get(what)}, and this one {mine}")
        writeback = bool(facts.get("writeback"))
        if not self._in_memory:
            for _ in content:
                raise StateRefused("it has content, and this disk is a file")
            return Loaded(lambda: self._adopt(-1, writeback))
        fd = memory_file("vdpabridge-disk", self._size_bytes)
        try:
            for chunk in content:
                if len(chunk) <= _EXTENT.size:
                    raise StateRefused("it has a piece of the disk without content")
                at = _EXTENT.unpack_from(chunk)[0]
                if at + len(chunk) - _EXTENT.size > self._size_bytes:
                    raise StateRefused("it has content outside of the disk")
                os.pwrite(fd, memoryview(chunk)[_EXTENT.size :], at)
        except BaseException:
            os.close(fd)
            raise
        return Loaded(lambda: self._adopt(fd, writeback), lambda: os.close(fd))

    def _adopt(self, fd: int, writeback: bool) -> None:
        """Use disk ``fd`` (takes ownership; -1 for the same as before) and this cache mode from now on."""
        self._writeback = writeback
        if fd >= 0:
            old, self._fd = self._fd, fd
            os.close(old)

    def reset(self) -> None:
        self._writeback = True

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _data_extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data: (begin, end)."""
    at = 0
    while at < size_bytes:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = min(os.lseek(fd, at, os.SEEK_HOLE), size_bytes)
        yield at, end
        at = end
