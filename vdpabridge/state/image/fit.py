"""Checks whether one device can continue another's work, before either is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from ...abi.configurations import CONFIGURATIONS
from ...abi.virtio import VIRTIO_F_RING_PACKED, VIRTIO_ID_BLOCK, VIRTIO_ID_NET
from ...abi.virtio_blk import VIRTIO_BLK_CONFIG
from ...abi.virtio_net import VIRTIO_NET_CONFIG
from ...device import Capability, Device, MemoryRegion
from ...device.rules import ALTERNATIVES
from ...errors import MissingCapability
from ..losses import Loss, require_accepted, unwelcome
from ..snapshot import DeviceSnapshot, SnapshotError, check_snapshot, guest_written
from .writer import ImageFacts

__all__ = ["check_fits", "check_memory", "facts_of"]


def facts_of(device: Device, snapshot: DeviceSnapshot) -> ImageFacts:
    """What an image says about ``device``, whose snapshot is ``snapshot``. Raises `SnapshotError`."""
    identity = device.identity
    for index, record in device.queues.items():
        if record.setup is not None and record.setup.address_space:
            why = f"queue {index} is in address space {record.setup.address_space}, which an image cannot record"
            raise SnapshotError("save", device=device.name, why=why)
    return ImageFacts(
        snapshot,
        device.offered_features,
        identity.queue_count,
        identity.queue_size_max,
        Capability.DEVICE_STATE in device.capabilities,
    )


#: Parts of the configuration space that may differ: what the guest writes, and what changes by itself. (from, to)
_MAY_DIFFER = {
    VIRTIO_ID_BLOCK: [(VIRTIO_BLK_CONFIG.offsets["wce"], VIRTIO_BLK_CONFIG.offsets["unused"])],
    VIRTIO_ID_NET: [(VIRTIO_NET_CONFIG.offsets["status"], VIRTIO_NET_CONFIG.offsets["max_virtqueue_pairs"])],
}


def _field_at(device_id: int | None, at: int) -> str:
    """The name of the field that byte ``at`` of the configuration space is in."""
    layout = CONFIGURATIONS.get(device_id or 0)
    before = {} if layout is None else {offset: name for name, offset in layout.offsets.items() if offset <= at}
    return before[max(before)] if before else f"byte {at}"


def _shown(config: bytes | bytearray, at: int) -> str:
    return bytes(config[at : at + 8]).hex()


def _check_config(snapshot: DeviceSnapshot, device: Device) -> None:
    """Refuse a difference in what a guest reads only when it starts: capacity, queues, addresses."""
    ours, theirs = bytearray(device.read_config()), bytearray(snapshot.config)
    for at, data in guest_written(snapshot):
        if ours[at : at + len(data)] != data and Capability.CONFIG_WRITE not in device.capabilities:
            why = f"the guest has set {data.hex()} at {at} of the configuration space, which cannot be written here"
            raise SnapshotError("load", device=device.name, why=why, hint="load it into a device of the same kind")
    for begin, end in _MAY_DIFFER.get(device.identity.device_id or 0, []):
        ours[begin:end] = theirs[begin:end]
    if ours != theirs:
        at = next(place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        field = _field_at(device.identity.device_id, at)
        found = f"{_shown(theirs, at)} was saved, and here is {_shown(ours, at)}"
        why = f"its configuration space differs in {field}: {found}"
        raise SnapshotError("load", device=device.name, why=why, hint="load it into a device of the same kind")


def check_memory(facts: ImageFacts, device: Device, guest: Sequence[MemoryRegion] = ()) -> None:
    """Raise `SnapshotError` unless ``device`` has all rings mapped, and all memory in the regions of ``guest``.

    A device that lacks some of it would fail at its first request, or, on some hardware, silently.
    """
    for index, queue in facts.snapshot.queues.items():
        for begin, size in queue.setup.parts(packed=bool(facts.snapshot.features >> VIRTIO_F_RING_PACKED & 1)):
            if gap := _gap(device.regions, begin, size, queue.setup.address_space):
                _refuse_memory(device, f"queue {index} has {gap[1]} bytes at {gap[0]:#x}")
    for region in guest:
        if gap := _gap(device.regions, region.guest_address, region.size_bytes, region.address_space):
            _refuse_memory(device, f"the guest has {gap[1]} bytes at {gap[0]:#x}")


def _gap(regions: Iterable[MemoryRegion], begin: int, size: int, address_space: int) -> tuple[int, int] | None:
    """The first (address, size) of the range that no region has; None if all of it is mapped."""
    end = begin + size
    for region in sorted(regions, key=lambda each: each.guest_address):
        if region.address_space == address_space and region.guest_address <= begin:
            begin = max(begin, region.guest_address + region.size_bytes)
    return (begin, end - begin) if begin < end else None


def _refuse_memory(device: Device, what: str) -> None:
    raise SnapshotError("load", device=device.name, why=f"{what}, which is not mapped", hint="map() all of it first")


def check_fits(facts: ImageFacts, device: Device, accept: Set[Loss] = frozenset()) -> None:
    """Raise `SnapshotError`, `FeatureError`, `StateError` or `MissingCapability` if ``device`` cannot continue
    from ``facts``, `StateWouldBeLost` if it could only without state that the guest relies on."""
    snapshot = facts.snapshot
    check_snapshot(device, snapshot)
    losses = unwelcome(snapshot.device_id, snapshot.features, facts.has_state, device)
    require_accepted("load", device, losses, accept, "it is not carried over")
    whole = device.identity.config_size_bytes
    if len(snapshot.config) == whole and whole:
        _check_config(snapshot, device)
    if len(snapshot.config) != whole:
        why = f"its configuration space has {len(snapshot.config)} bytes, and the device's {whole}"
        raise SnapshotError("load", device=device.name, why=why, hint="load it into a device of the same kind")
    if facts.has_state and Capability.DEVICE_STATE not in device.capabilities:
        alternative = ALTERNATIVES[Capability.DEVICE_STATE]
        raise MissingCapability(device.name, "load", Capability.DEVICE_STATE.value, alternative)
