"""What a back-end advertises for a device: what the device does completely, and nothing else.

QEMU negotiates every bit that both sides know, so a bit that is offered is a promise.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...abi.vhost import VHOST_F_LOG_ALL
from ...abi.vhost_user import VHOST_USER_F_PROTOCOL_FEATURES, ProtocolFeature
from ...abi.virtio import (
    VIRTIO_F_ADMIN_VQ,
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_SR_IOV,
    VIRTIO_F_SUSPEND,
)
from ...device import Capability, Device

__all__ = ["MEMORY_SLOTS", "features_of", "protocol_features_of"]

#: Regions of memory; QEMU uses at most 512.
MEMORY_SLOTS = 512
#: Features that the protocol cannot carry: a kick by eventfd has no data, and a guest's administration and suspend
#: requests do not reach a back-end.
_NOT_BY_VHOST_USER = sum(
    1 << bit for bit in (VIRTIO_F_SR_IOV, VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_ADMIN_VQ, VIRTIO_F_SUSPEND)
)
#: Never STATUS: front-ends write 0 there whenever a guest stops, which a device takes as a reset.
_ALWAYS = (ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIGURE_MEM_SLOTS)
_WITH: Mapping[ProtocolFeature, frozenset[Capability]] = {
    ProtocolFeature.LOG_SHMFD: frozenset({Capability.DIRTY_LOG}),
    ProtocolFeature.BACKEND_REQ: frozenset({Capability.CONFIG_CALL}),
    ProtocolFeature.INFLIGHT_SHMFD: frozenset({Capability.INFLIGHT}),
    ProtocolFeature.RESET_DEVICE: frozenset({Capability.STATE_RESET}),
    ProtocolFeature.DEVICE_STATE: frozenset({Capability.DEVICE_STATE}),
    ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN: frozenset(
        {Capability.SKIP_DRAIN, Capability.QUEUE_CONTROL, Capability.INFLIGHT}
    ),
}


def features_of(device: Device) -> int:
    """The reply to GET_FEATURES."""
    features = device.offered_features & ~_NOT_BY_VHOST_USER | 1 << VHOST_USER_F_PROTOCOL_FEATURES
    if Capability.QUEUE_CONTROL not in device.capabilities:
        # the guest's driver would stop one queue, and all would stop
        features &= ~(1 << VIRTIO_F_RING_RESET)
    if Capability.DIRTY_LOG in device.capabilities:
        features |= 1 << VHOST_F_LOG_ALL
    return features


def protocol_features_of(device: Device) -> int:
    """The reply to GET_PROTOCOL_FEATURES."""
    capabilities = device.capabilities
    offered = [*_ALWAYS, *(feature for feature, needs in _WITH.items() if needs <= capabilities)]
    if device.identity.config_size_bytes:
        offered.append(ProtocolFeature.CONFIG)
    return sum(1 << feature for feature in offered)
