"""The virtio-level state of a stopped device: what it negotiated and where its queues stand.

With the guest's memory, which the rings lie in, this is all that a device without internal state needs to continue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..abi.virtio import VIRTIO_ID_BLOCK
from ..abi.virtio_blk import VIRTIO_BLK_CONFIG, VIRTIO_BLK_F_CONFIG_WCE
from ..device import Device, QueueBase, QueueSetup, SplitBase
from ..device.rules import Operation, RunState
from ..errors import FeatureError, StateError, VdpaBridgeError

__all__ = [
    "DeviceSnapshot",
    "QueueEventfds",
    "QueueSnapshot",
    "SnapshotError",
    "capture",
    "check_snapshot",
    "eventfds_of",
    "guest_written",
    "outline",
    "place",
    "prepare",
    "restore",
]


class SnapshotError(VdpaBridgeError):
    """A snapshot that does not fit the device; the device was not touched."""


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """A queue: where it lies, where it stands, and whether it was enabled."""

    setup: QueueSetup
    base: QueueBase
    enabled: bool


@dataclass(frozen=True, slots=True)
class DeviceSnapshot:
    """The virtio-level state of a device."""

    device_id: int | None
    features: int
    """The features that the guest had accepted."""
    queues: Mapping[int, QueueSnapshot]
    config: bytes
    started: bool | None = None
    """Whether the device was at work before it was suspended (DRIVER_OK); None if that is not known."""


@dataclass(frozen=True, slots=True)
class QueueEventfds:
    """A queue's eventfds in the process that restores; borrowed. None if one is not used."""

    kick: int | None = None
    call: int | None = None
    err: int | None = None


def capture(device: Device) -> DeviceSnapshot:
    """The snapshot of a suspended (or merely configured) device. Does not change the device.

    Raises `DeviceFailed` if the device has failed meanwhile.
    """
    snapshot = _snapshot(device, device.get_base)
    if device.state is RunState.SUSPENDED:
        # a device that failed, or that something else reset, answers too, with positions at the beginning
        device.check_health()
    return snapshot


def outline(device: Device) -> DeviceSnapshot:
    """The snapshot of a device that may run, as `capture` would give it; its positions are not known, and 0 here."""
    return _snapshot(device, lambda _index: SplitBase())


def _snapshot(device: Device, base_of: Callable[[int], QueueBase]) -> DeviceSnapshot:
    queues = {
        index: QueueSnapshot(record.setup, base_of(index), record.enabled)
        for index, record in sorted(device.queues.items())
        if record.setup is not None
    }
    config = device.read_config() if device.identity.config_size_bytes else b""
    started = device.state is not RunState.CONFIGURED
    return DeviceSnapshot(device.identity.device_id, device.accepted_features, queues, config, started)


def restore(device: Device, snapshot: DeviceSnapshot, eventfds: Mapping[int, QueueEventfds]) -> None:
    """Bring a reset ``device`` to where ``snapshot`` was taken, without `Device.start`.

    ``eventfds`` are those of this process, by queue. The caller maps the guest's memory. Raises `SnapshotError`,
    `FeatureError` or `StateError` before the device is touched, if the two do not fit; if a step fails, the device is
    reset.
    """
    check_snapshot(device, snapshot)
    try:
        prepare(device, snapshot, eventfds)
        place(device, snapshot, eventfds)
    except BaseException:
        device.reset()
        raise


def prepare(device: Device, snapshot: DeviceSnapshot, eventfds: Mapping[int, QueueEventfds]) -> None:
    """The part of `restore` that needs no position: it can be done while the device to be replaced is at work.

    It does not set the kicks: that device still gets them, and another may do anything with them before it is started.
    """
    device.accept_features(snapshot.features)
    for index, queue in snapshot.queues.items():
        device.set_queue(index, queue.setup)
        wires = eventfds.get(index, QueueEventfds())
        device.set_call(index, wires.call)
        device.set_err(index, wires.err)


def place(device: Device, snapshot: DeviceSnapshot, eventfds: Mapping[int, QueueEventfds]) -> None:
    """The rest of `restore`: the queues' positions, what the guest has set, and the kicks."""
    _restore_config(device, snapshot)
    for index, queue in snapshot.queues.items():
        device.set_base(index, queue.base)
        device.set_kick(index, eventfds.get(index, QueueEventfds()).kick)
        device.enable_queue(index, queue.enabled)


def guest_written(snapshot: DeviceSnapshot) -> list[tuple[int, bytes]]:
    """(offset, bytes) of what the guest may have written in the configuration space. A fresh device has its own values
    there.

    Source: VIRTIO 1.4, 5.2.5 (a disk's ``writeback``); since VIRTIO 1.0 a guest may write no
    other field of a disk, network card or file system.
    """
    at = VIRTIO_BLK_CONFIG.offsets["wce"]
    can_write = snapshot.device_id == VIRTIO_ID_BLOCK and snapshot.features >> VIRTIO_BLK_F_CONFIG_WCE & 1
    # a back-end without CONFIG shows none of it
    return [(at, snapshot.config[at : at + 1])] if can_write and at < len(snapshot.config) else []


def _restore_config(device: Device, snapshot: DeviceSnapshot) -> None:
    for offset, data in guest_written(snapshot):
        if device.read_config(offset, len(data)) == data:
            continue
        device.write_config(offset, data)
        # a device silently ignores writes that it does not accept
        if device.read_config(offset, len(data)) != data:
            _refuse(device, f"its configuration space does not take {data.hex()} at {offset}, which the guest had set")


def eventfds_of(device: Device) -> dict[int, QueueEventfds]:
    """The eventfds that ``device`` was given, borrowed from it: they are closed when it is reset."""
    return {
        index: QueueEventfds(
            record.eventfds.get(Operation.SET_KICK),
            record.eventfds.get(Operation.SET_CALL),
            record.eventfds.get(Operation.SET_ERR),
        )
        for index, record in device.queues.items()
    }


def check_snapshot(device: Device, snapshot: DeviceSnapshot) -> None:
    """Raise `SnapshotError`, `FeatureError` or `StateError` if ``device`` cannot continue from ``snapshot``."""
    if device.state is not RunState.RESET:
        raise StateError(device.name, "restore", device.state.value, (RunState.RESET.value,))
    identity = device.identity
    if None not in (identity.device_id, snapshot.device_id) and identity.device_id != snapshot.device_id:
        _refuse(device, f"the snapshot is of device id {snapshot.device_id}, this is {identity.device_id}")
    if missing := snapshot.features & ~device.offered_features:
        raise FeatureError(device.name, f"the snapshot needs bits {missing:#x}, which are not offered", missing)
    for index, queue in snapshot.queues.items():
        if index >= identity.queue_count:
            _refuse(device, f"the snapshot has queue {index}, and the device has {identity.queue_count}")
        if queue.setup.size > identity.queue_size_max:
            _refuse(
                device,
                f"queue {index} has {queue.setup.size} descriptors, the device has at most {identity.queue_size_max}",
            )


def _refuse(device: Device, why: str) -> None:
    raise SnapshotError("restore", device=device.name, why=why, hint="restore it on a device of the same kind")
