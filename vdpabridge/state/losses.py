"""State that would be lost silently: each loss has a name, and is refused unless the caller accepts it."""

from __future__ import annotations

from collections.abc import Iterable, Set
from enum import Enum

from ..abi.virtio import VIRTIO_ID_FS, VIRTIO_ID_NET
from ..abi.virtio_net import VIRTIO_NET_F_CTRL_VQ
from ..device import Capability, Device
from ..errors import VdpaBridgeError

__all__ = ["Loss", "StateWouldBeLost", "require_accepted", "resumes_by_itself", "unsavable", "unwelcome"]


class Loss(Enum):
    """What a procedure cannot carry. A caller that passes one in ``accept`` can do without it."""

    DEVICE_STATE = "device-state"
    """The device's own state: what a file server knows of its guest, the content of a disk in memory."""
    CONTROL_QUEUE = "control-queue"
    """What a guest has set by a network device's control queue: MAC filters, queue pairs, VLANs, offloads. The
    program that drives that queue can send the commands again (QEMU does)."""


_MEANINGS = {
    Loss.DEVICE_STATE: "the device's own state",
    Loss.CONTROL_QUEUE: "what the guest has set by the control queue (MAC filters, queue pairs, VLANs, offloads)",
}


class StateWouldBeLost(VdpaBridgeError):
    """Refused before anything was done: ``losses`` are what would be missing afterwards."""

    nothing_done = True

    def __init__(self, what: str, device: str, losses: Set[Loss], why: str) -> None:
        lost = " and ".join(_MEANINGS[loss] for loss in Loss if loss in losses)
        names = ", ".join(loss.value for loss in Loss if loss in losses)
        hint = f"accept the loss ({names}) if you can do without it, or set it again"
        super().__init__(what, device=device, why=f"{lost} would be lost: {why}", hint=hint)
        self.losses = frozenset(losses)


def require_accepted(what: str, device: Device, losses: Iterable[Loss], accept: Set[Loss], why: str) -> None:
    """Raise `StateWouldBeLost` unless all of ``losses`` are in ``accept``."""
    if left := frozenset(losses) - accept:
        raise StateWouldBeLost(what, device.name, left, why)


def unsavable(device: Device) -> frozenset[Loss]:
    """What ``device`` has, or may have, and cannot give away."""
    device_id = device.identity.device_id
    found = set()
    if device_id == VIRTIO_ID_FS and Capability.DEVICE_STATE not in device.capabilities:
        # every file server has state of its guest
        found.add(Loss.DEVICE_STATE)
    if device_id == VIRTIO_ID_NET and device.accepted_features >> VIRTIO_NET_F_CTRL_VQ & 1:
        found.add(Loss.CONTROL_QUEUE)
    return frozenset(found)


def unwelcome(device_id: int | None, features: int, has_state: bool, destination: Device) -> frozenset[Loss]:
    """What ``destination`` would lack, after a device that worked with ``features`` and gave its state or did not."""
    found = set()
    if not has_state and (Capability.DEVICE_STATE in destination.capabilities or device_id == VIRTIO_ID_FS):
        # it would begin with another state than the guest knows
        found.add(Loss.DEVICE_STATE)
    if device_id == VIRTIO_ID_NET and features >> VIRTIO_NET_F_CTRL_VQ & 1:
        found.add(Loss.CONTROL_QUEUE)
    return frozenset(found)


def resumes_by_itself(device: Device) -> bool:
    """Whether ``device`` resumes after a suspend without a reset, which would drop its state."""
    return Capability.RESUME in device.capabilities
