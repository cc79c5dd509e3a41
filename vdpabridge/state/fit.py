"""Whether one device can go on with another's work; asked before either is touched."""

from __future__ import annotations

from ..device import Capability, Device, SplitBase
from ..errors import MissingCapability
from ..transitions import ALTERNATIVES
from .image import ImageFacts
from .snapshot import DeviceSnapshot, QueueSnapshot, SnapshotError, check_snapshot

__all__ = ["check_fits", "facts_of"]


def facts_of(device: Device, snapshot: DeviceSnapshot | None) -> ImageFacts:
    """What an image says of ``device``. Without a ``snapshot``, of one that may run: its positions are not known."""
    identity = device.identity
    if snapshot is None:
        queues = {
            index: QueueSnapshot(record.setup, SplitBase(), record.enabled)
            for index, record in device.queues.items()
            if record.setup is not None
        }
        config = device.read_config() if identity.config_size_bytes else b""
        snapshot = DeviceSnapshot(identity.device_id, device.accepted_features, queues, config)
    return ImageFacts(
        snapshot,
        device.offered_features,
        identity.queue_count,
        identity.queue_size_max,
        Capability.DEVICE_STATE in device.capabilities,
    )


def check_fits(facts: ImageFacts, device: Device) -> None:
    """Raise `SnapshotError`, `FeatureError`, `StateError` or `MissingCapability` where ``device`` cannot go on."""
    snapshot = facts.snapshot
    check_snapshot(device, snapshot)
    whole = device.identity.config_size_bytes
    if len(snapshot.config) != whole:
        why = f"its configuration space has {len(snapshot.config)} bytes, and the device's {whole}"
        raise SnapshotError("load", device=device.name, why=why, hint="load it into a device of the same kind")
    if facts.has_state and Capability.DEVICE_STATE not in device.capabilities:
        alternative = ALTERNATIVES[Capability.DEVICE_STATE]
        raise MissingCapability(device.name, "load", Capability.DEVICE_STATE.value, alternative)
