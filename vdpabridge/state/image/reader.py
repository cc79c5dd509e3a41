"""Reads a state image, as `IMAGE.md` specifies it, and refuses everything else.

Reading needs memory for one part at a time, whatever the size of the device's state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

from ...abi.state_image import (
    DIGEST_BYTES,
    END,
    HEADER,
    HEADER_MAGIC,
    IDENTITY,
    IDENTITY_HAS_STATE,
    OPTIONAL_PARTS,
    PART_HEADER,
    PART_OPTIONAL,
    PART_SIZES,
    PART_VALUE_BYTES_MAX,
    REPEATED_PARTS,
    REQUIRED_PARTS,
    SELECTOR_INDEX,
    STATUS_CONFIGURED,
    STATUS_STARTED,
    UNKNOWN_DEVICE_ID,
    VERSION,
    VQ_CFG,
    VQ_POSITION,
    PartType,
)
from ...abi.virtio import VIRTIO_F_RING_PACKED
from ...abi.vring_base import PackedBase, decode_base
from ...device import QueueSetup
from ...errors import VdpaBridgeError
from ..snapshot import DeviceSnapshot, QueueSnapshot
from .writer import ImageFacts

__all__ = ["ImageError", "ImageReader"]

_NO_SELECTOR = bytes(8)
_QUEUE_INDEX_MAX = 0xFFFF
_KNOWN = frozenset(map(int, PartType))
_RANK = {kind: position for position, kind in enumerate(PartType)}
_STARTED = {STATUS_CONFIGURED: False, STATUS_STARTED: True}


class ImageError(VdpaBridgeError):
    """Something that is not an image, or a damaged one. ``offset`` is the place in the stream."""

    def __init__(self, why: str, offset: int) -> None:
        super().__init__("state image", why=f"at byte {offset}: {why}", hint="nothing of it was given to the device")
        self.offset = offset


class ImageReader:
    """Reads one image by ``read``, which gives as many bytes as asked for, fewer only at the end of the stream.

    `state` gives the device's state as it comes. Only after its end is the image known to be whole.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """Read the facts. Raises `ImageError`."""
        self._read = read
        self._digest = hashlib.sha256()
        self._at = 0
        self._seen: dict[PartType, int] = {}
        self._parts = 0
        self._state_bytes = 0
        self.digest = b""
        """The digest of an image that was read to its end."""
        self._check_header()
        self._next = self._part()
        self.facts = self._facts()

    def state(self) -> Iterator[bytes]:
        """The pieces of the device's state. Raises `ImageError`, at the latest after the last piece."""
        while self._next[0] is PartType.DEVICE_STATE:
            number, reserved = SELECTOR_INDEX.unpack(self._next[1])
            value = self._next[2]
            if not self.facts.has_state or not value or reserved or number != self._piece_number():
                raise self._error("a piece of device state that is out of place")
            self._state_bytes += len(value)
            yield value
            self._next = self._part()
        self._check_end()

    # --- the stream ---

    def _check_header(self) -> None:
        magic, version, compatible, reserved = HEADER.unpack(self._take(HEADER.size_bytes))
        if magic != HEADER_MAGIC:
            raise self._error("it does not begin as an image does")
        if compatible > VERSION or version < compatible or reserved:
            raise self._error(
                f"version {version}, readable from version {compatible} on, and this program has {VERSION}"
            )

    def _part(self) -> tuple[PartType, bytes, bytes]:
        """The next part of a known type: type, selector, value. The end's value lacks the digest."""
        while True:
            number, flags, reserved, selector, length = PART_HEADER.unpack(self._take(PART_HEADER.size_bytes))
            misplaced = number in _KNOWN and bool(flags) != (PartType(number) in OPTIONAL_PARTS)
            if reserved or flags & ~PART_OPTIONAL or length > PART_VALUE_BYTES_MAX or misplaced:
                raise self._error(f"a part of type {number:#x}, flags {flags:#x}, {length} bytes")
            if number in _KNOWN:
                kind = PartType(number)
                self._check_order(kind)
                if kind is PartType.END and length != END.size_bytes:
                    raise self._error(f"an end of {length} bytes")
                value = self._take(length - DIGEST_BYTES if kind is PartType.END else length)
                self._parts += kind is not PartType.END
                return kind, selector, value
            if not flags & PART_OPTIONAL:
                raise self._error(f"a part of type {number:#x}, which this program does not know and may not skip")
            self._take(length)
            self._parts += 1

    def _check_order(self, kind: PartType) -> None:
        count = self._seen.get(kind, 0)
        last = max((_RANK[each] for each in self._seen), default=-1)
        if _RANK[kind] < last or (count and kind not in REPEATED_PARTS):
            raise self._error(f"a part {kind.name} that is out of order")
        self._seen[kind] = count + 1

    def _check_end(self) -> None:
        kind, selector, value = self._next
        if kind is not PartType.END or selector != _NO_SELECTOR:
            raise self._error(f"a part {kind.name} that is out of order")
        parts, state_bytes, _ = END.unpack(value + bytes(DIGEST_BYTES))
        if (parts, state_bytes) != (self._parts, self._state_bytes):
            raise self._error(
                f"it says that it has {parts} parts and {state_bytes} bytes of state, and does not have them"
            )
        computed = self._digest.digest()
        if self._take(DIGEST_BYTES) != computed:
            raise self._error("the digest is wrong: it was damaged")
        if self._read(1):
            raise self._error("something follows the end")
        self.digest = computed

    def _take(self, size: int) -> bytes:
        data = self._read(size)
        self._at += len(data)
        if len(data) < size:
            raise self._error("it ends in the middle")
        self._digest.update(data)
        return data

    def _piece_number(self) -> int:
        return (self._seen[PartType.DEVICE_STATE] - 1) & 0xFFFFFFFF

    def _error(self, why: str) -> ImageError:
        return ImageError(why, self._at)

    # --- the facts ---

    def _facts(self) -> ImageFacts:
        values: dict[PartType, dict[int, bytes]] = {}
        last: dict[PartType, int] = {}
        while self._next[0] not in (PartType.DEVICE_STATE, PartType.END):
            kind, selector, value = self._next
            index, reserved = SELECTOR_INDEX.unpack(selector)
            those = values.setdefault(kind, {})
            if reserved or index > (_QUEUE_INDEX_MAX if kind in REPEATED_PARTS else 0) or index <= last.get(kind, -1):
                raise self._error(f"a part {kind.name} of {index} that is out of order")
            if kind in PART_SIZES and len(value) != PART_SIZES[kind]:
                raise self._error(f"a part {kind.name} of {len(value)} bytes")
            last[kind] = index
            those[index] = value
            self._next = self._part()
        return self._decode(values)

    def _decode(self, values: dict[PartType, dict[int, bytes]]) -> ImageFacts:
        for kind in REQUIRED_PARTS - {PartType.END}:
            if kind not in values:
                raise self._error(f"there is no part {kind.name}")
        device_id, flags, queue_count, queue_size_max, config_size = IDENTITY.unpack(values[PartType.IDENTITY][0])
        config = values.get(PartType.CONFIG_SPACE, {}).get(0, b"")
        setups, positions = values.get(PartType.VQ_CFG, {}), values.get(PartType.VQ_POSITION, {})
        if flags & ~IDENTITY_HAS_STATE or len(config) != config_size or set(setups) != set(positions):
            raise self._error("its parts do not fit together")
        queues = {index: self._queue(setups[index], positions[index]) for index in setups}
        if any(index >= queue_count for index in queues):
            raise self._error(f"queue {max(queues)} of {queue_count}")
        known_id = None if device_id == UNKNOWN_DEVICE_ID else device_id
        offered = values.get(PartType.DEV_FEATURES, {}).get(0)
        accepted = int.from_bytes(values[PartType.DRV_FEATURES][0], "little")
        self._check_queues(queues, queue_size_max, packed=bool(accepted >> VIRTIO_F_RING_PACKED & 1))
        if offered is not None and accepted & ~int.from_bytes(offered, "little"):
            raise self._error("features that were accepted and not offered")
        snapshot = DeviceSnapshot(known_id, accepted, queues, config, self._started(values))
        return ImageFacts(
            snapshot,
            None if offered is None else int.from_bytes(offered, "little"),
            queue_count,
            queue_size_max,
            bool(flags & IDENTITY_HAS_STATE),
        )

    def _started(self, values: dict[PartType, dict[int, bytes]]) -> bool | None:
        part = values.get(PartType.DEVICE_STATUS)
        if part is None:
            return None
        if part[0][0] not in _STARTED:
            raise self._error(f"a device status of {part[0][0]:#x}")
        return _STARTED[part[0][0]]

    def _check_queues(self, queues: Mapping[int, QueueSnapshot], size_max: int, *, packed: bool) -> None:
        for index, queue in queues.items():
            if isinstance(queue.base, PackedBase) != packed:
                raise self._error(f"queue {index} has a position of the other kind of ring")
            size = queue.setup.size
            if size > size_max or (not packed and size & (size - 1)):
                raise self._error(f"queue {index} of {size} descriptors")

    def _queue(self, setup: bytes, position: bytes) -> QueueSnapshot:
        size, _, enabled, reserved, desc, driver, device = VQ_CFG.unpack(setup)
        word, packed = VQ_POSITION.unpack(position)
        if enabled > 1 or reserved or packed > 1 or not size or (not packed and word > 0xFFFF):
            raise self._error("an invalid queue")
        base = decode_base(word, packed=bool(packed))
        return QueueSnapshot(QueueSetup(size, desc, driver, device), base, bool(enabled))
