"""Writes the state image of a device, as a stream. `IMAGE.md` specifies it.

Writing needs memory for one part at a time, whatever the size of the device's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from ...abi.state_image import (
    COMPATIBLE_VERSION,
    DIGEST_BYTES,
    END,
    HEADER,
    HEADER_MAGIC,
    IDENTITY,
    IDENTITY_HAS_STATE,
    OPTIONAL_PARTS,
    PART_HEADER,
    PART_OPTIONAL,
    PART_VALUE_BYTES_MAX,
    SELECTOR_INDEX,
    STATUS_CONFIGURED,
    STATUS_STARTED,
    UNKNOWN_DEVICE_ID,
    VERSION,
    VQ_CFG,
    VQ_POSITION,
    PartType,
)
from ...abi.vring_base import PackedBase, QueueBase
from ..snapshot import DeviceSnapshot
from .digest import Digest

__all__ = ["ImageFacts", "ImageWriter"]

_NO_SELECTOR = bytes(8)
_NO_VECTOR = 0xFFFF


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image says about a device, beside the device's own state."""

    snapshot: DeviceSnapshot
    offered_features: int | None
    """None if the image does not have them."""
    queue_count: int
    queue_size_max: int
    has_state: bool


class ImageWriter:
    """Writes one image by ``write``: the facts, then any number of pieces of device state, then the end."""

    def __init__(self, write: Callable[[bytes | memoryview], None], facts: ImageFacts) -> None:
        self._write = write
        self._digest = Digest()
        self._parts = 0
        self._state_bytes = 0
        self._put(HEADER.pack(HEADER_MAGIC, VERSION, COMPATIBLE_VERSION, 0))
        for kind, selector, value in _fact_parts(facts):
            self._part(kind, selector, value)
        self._pieces = 0

    def close(self) -> None:
        """End the thread that hashes. Idempotent."""
        self._digest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self, data: memoryview) -> None:
        """Write the next piece of device state, of any size. Ignores an empty one.

        The piece is still hashed until the call for the next piece, or `end`, returns: do not change it before.
        """
        for at in range(0, len(data), PART_VALUE_BYTES_MAX):
            piece = data[at : at + PART_VALUE_BYTES_MAX]
            self._part(PartType.DEVICE_STATE, SELECTOR_INDEX.pack(self._pieces & 0xFFFFFFFF, 0), piece)
            self._pieces += 1
            self._state_bytes += len(piece)

    def end(self) -> bytes:
        """Write the end; returns the digest."""
        head = PART_HEADER.pack(PartType.END, 0, 0, _NO_SELECTOR, END.size_bytes)
        counts = END.pack(self._parts, self._state_bytes, bytes(DIGEST_BYTES))[:-DIGEST_BYTES]
        self._put(head + counts)
        digest = self._digest.digest()
        self._write(digest)
        return digest

    def _part(self, kind: PartType, selector: bytes, value: bytes | memoryview) -> None:
        flags = PART_OPTIONAL if kind in OPTIONAL_PARTS else 0
        self._put(PART_HEADER.pack(kind, flags, 0, selector, len(value)))
        self._put(value)
        self._parts += 1

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._write(data)


def _fact_parts(facts: ImageFacts) -> Iterator[tuple[PartType, bytes, bytes]]:
    snapshot = facts.snapshot
    device_id = UNKNOWN_DEVICE_ID if snapshot.device_id is None else snapshot.device_id
    flags = IDENTITY_HAS_STATE if facts.has_state else 0
    identity = IDENTITY.pack(device_id, flags, facts.queue_count, facts.queue_size_max, len(snapshot.config))
    yield PartType.IDENTITY, _NO_SELECTOR, identity
    if facts.offered_features is not None:
        yield PartType.DEV_FEATURES, _NO_SELECTOR, facts.offered_features.to_bytes(8, "little")
    yield PartType.DRV_FEATURES, _NO_SELECTOR, snapshot.features.to_bytes(8, "little")
    if snapshot.started is not None:
        yield PartType.DEVICE_STATUS, _NO_SELECTOR, bytes([STATUS_STARTED if snapshot.started else STATUS_CONFIGURED])
    queues = sorted(snapshot.queues.items())
    for index, queue in queues:
        setup = queue.setup
        where = (setup.desc_address, setup.avail_address, setup.used_address)
        value = VQ_CFG.pack(setup.size, _NO_VECTOR, int(queue.enabled), 0, *where)
        yield PartType.VQ_CFG, SELECTOR_INDEX.pack(index, 0), value
    for index, queue in queues:
        yield PartType.VQ_POSITION, SELECTOR_INDEX.pack(index, 0), _position(queue.base)
    if snapshot.config:
        yield PartType.CONFIG_SPACE, _NO_SELECTOR, snapshot.config


def _position(base: QueueBase) -> bytes:
    return VQ_POSITION.pack(base.encode(), int(isinstance(base, PackedBase)))
