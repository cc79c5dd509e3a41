"""Whether one device can go on with another's work; asked before either is touched."""

from __future__ import annotations

from ..abi.virtio import VIRTIO_ID_BLOCK, VIRTIO_ID_NET
from ..abi.virtio_blk import VIRTIO_BLK_CONFIG
from ..abi.virtio_net import VIRTIO_NET_CONFIG
from ..device import Capability, Device, RunState, SplitBase
from ..errors import MissingCapability
from ..transitions import ALTERNATIVES
from .image import ImageFacts
from .snapshot import DeviceSnapshot, QueueSnapshot, SnapshotError, check_snapshot, guest_written

__all__ = ["check_fits", "facts_of"]


def facts_of(device: Device, snapshot: DeviceSnapshot | None) -> ImageFacts:
    """What an image says of ``device``. Without a ``snapshot``, of one that may run: its positions are not known."""
    identity = device.identity
    for index, record in device.queues.items():
        if record.setup is not None and record.setup.address_space:
            why = f"queue {index} is in address space {record.setup.address_space}, which an image has no word for"
            raise SnapshotError("save", device=device.name, why=why)
    if snapshot is None:
        queues = {
            index: QueueSnapshot(record.setup, SplitBase(), record.enabled)
            for index, record in device.queues.items()
            if record.setup is not None
        }
        config = device.read_config() if identity.config_size_bytes else b""
        started = device.state is not RunState.CONFIGURED
        snapshot = DeviceSnapshot(identity.device_id, device.accepted_features, queues, config, started)
    return ImageFacts(
        snapshot,
        device.offered_features,
        identity.queue_count,
        identity.queue_size_max,
        Capability.DEVICE_STATE in device.capabilities,
    )


#: Parts of the configuration space that may differ: what the guest writes, and what is of the moment. (from, to)
_MAY_DIFFER = {
    VIRTIO_ID_BLOCK: [(VIRTIO_BLK_CONFIG.offsets["wce"], VIRTIO_BLK_CONFIG.offsets["unused"])],
    VIRTIO_ID_NET: [(VIRTIO_NET_CONFIG.offsets["status"], VIRTIO_NET_CONFIG.offsets["max_virtqueue_pairs"])],
}


def _check_config(snapshot: DeviceSnapshot, device: Device) -> None:
    """A guest does not read again what it read when it was started: capacity, queues, addresses."""
    ours, theirs = bytearray(device.read_config()), bytearray(snapshot.config)
    for at, data in guest_written(snapshot):
        if ours[at : at + len(data)] != data and Capability.CONFIG_WRITE not in device.capabilities:
            why = f"the guest has set {data.hex()} at {at} of the configuration space, which cannot be written here"
            raise SnapshotError("load", device=device.name, why=why, hint="load it into a device of the same kind")
    for begin, end in _MAY_DIFFER.get(device.identity.device_id or 0, []):
        ours[begin:end] = theirs[begin:end]
    if ours != theirs:
        at = next(place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        why = f"its configuration space differs from byte {at} on"
        raise SnapshotError("load", device=device.name, why=why, hint="load it into a device of the same kind")


def check_fits(facts: ImageFacts, device: Device) -> None:
    """Raise `SnapshotError`, `FeatureError`, `StateError` or `MissingCapability` where ``device`` cannot go on."""
    snapshot = facts.snapshot
    check_snapshot(device, snapshot)
    whole = device.identity.config_size_bytes
    if len(snapshot.config) == whole and whole:
        _check_config(snapshot, device)
    if len(snapshot.config) != whole:
        why = f"its configuration space has {len(snapshot.config)} bytes, and the device's {whole}"
        raise SnapshotError("load", device=device.name, why=why, hint="load it into a device of the same kind")
    if facts.has_state and Capability.DEVICE_STATE not in device.capabilities:
        alternative = ALTERNATIVES[Capability.DEVICE_STATE]
        raise MissingCapability(device.name, "load", Capability.DEVICE_STATE.value, alternative)
