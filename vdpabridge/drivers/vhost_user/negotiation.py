"""Negotiation with a back-end, in QEMU's order, with which every back-end was tested.

GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, always all three: otherwise back-ends on rust-vmm's vhost
before 0.14 never acknowledge anything, and their front-end waits for ever.
"""

from __future__ import annotations

from collections.abc import Set

from ...abi.vhost import VHOST_F_LOG_ALL
from ...abi.vhost_user import CONFIG_SIZE_MAX, VHOST_USER_F_PROTOCOL_FEATURES, FrontendRequest, ProtocolFeature
from ...abi.vhost_user_payloads import U64
from ...abi.virtio import VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET
from ...abi.virtio_blk import VIRTIO_BLK_CONFIG
from ...abi.virtio_fs import VIRTIO_FS_CONFIG
from ...device.rules import Capability
from .backend_requests import BackendRequests

__all__ = ["QUEUE_SIZE_MAX", "capabilities_of", "config_size_of", "negotiate", "queue_count_of"]

#: As many as the protocol can number: a kick's message has one byte for the queue. Queues beyond that are of no use.
QUEUES_MAX = 256
#: A back-end does not tell how large its rings may be. All of them take this size.
QUEUE_SIZE_MAX = 1024
#: What this driver knows how to use. Not GET_VRING_BASE_INFLIGHT: it would take away the choice that SKIP_DRAIN gives.
_WANTED = sum(
    1 << feature
    for feature in (
        ProtocolFeature.MQ,
        ProtocolFeature.LOG_SHMFD,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.CONFIG,
        ProtocolFeature.INFLIGHT_SHMFD,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.STATUS,
        ProtocolFeature.DEVICE_STATE,
        ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN,
    )
)
#: Queues of a back-end without MQ, by device id: one, or the least that its kind of device needs.
_QUEUES = {VIRTIO_ID_NET: 2, VIRTIO_ID_FS: 2}
_NET_CONFIG_BYTES = 12  # mac, status, max_virtqueue_pairs, mtu
_CONFIG_BYTES = {
    VIRTIO_ID_BLOCK: VIRTIO_BLK_CONFIG.size_bytes,
    VIRTIO_ID_FS: VIRTIO_FS_CONFIG.size_bytes,
    VIRTIO_ID_NET: _NET_CONFIG_BYTES,
}


def negotiate(requests: BackendRequests) -> int:
    """Negotiate protocol features; returns the virtio features that the back-end offers."""
    features = requests.ask_u64(FrontendRequest.GET_FEATURES)
    if features >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
        wanted = requests.ask_u64(FrontendRequest.GET_PROTOCOL_FEATURES) & _WANTED
        # sent without an acknowledgement: this request negotiates whether there are any
        requests.tell(FrontendRequest.SET_PROTOCOL_FEATURES, U64(wanted))
        requests.protocol_features = wanted
    return features


def queue_count_of(requests: BackendRequests, device_id: int | None, told: int | None) -> int:
    """How many queues the device has: what the caller says, else what the back-end says."""
    if told is not None:
        return min(told, QUEUES_MAX)
    if requests.has(ProtocolFeature.MQ):
        return min(requests.ask_u64(FrontendRequest.GET_QUEUE_NUM), QUEUES_MAX)
    return _QUEUES.get(device_id or 0, 1)


def config_size_of(requests: BackendRequests, device_id: int | None, told: int | None) -> int:
    """How large the configuration space is: what the caller says, else what its kind of device has."""
    if not requests.has(ProtocolFeature.CONFIG):
        return 0
    size = _CONFIG_BYTES.get(device_id or 0, 0) if told is None else told
    return min(size, CONFIG_SIZE_MAX)


def capabilities_of(requests: BackendRequests, features: int, config_size_bytes: int) -> Set[Capability]:
    """The capabilities that the negotiated features give."""
    has = requests.has
    found = {
        # suspend and resume only stop and start rings here
        Capability.SUSPEND: True,
        Capability.RESUME: True,
        Capability.SETUP_WHILE_SUSPENDED: True,
        Capability.QUEUE_CONTROL: True,
        Capability.ENABLE_WHILE_RUNNING: bool(features >> VHOST_USER_F_PROTOCOL_FEATURES & 1),
        Capability.DEVICE_STATE: has(ProtocolFeature.DEVICE_STATE),
        Capability.CONFIG_WRITE: config_size_bytes > 0,
        Capability.CONFIG_CALL: config_size_bytes > 0 and has(ProtocolFeature.BACKEND_REQ),
        Capability.SKIP_DRAIN: has(ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN) and has(ProtocolFeature.INFLIGHT_SHMFD),
        Capability.DIRTY_LOG: has(ProtocolFeature.LOG_SHMFD) and bool(features >> VHOST_F_LOG_ALL & 1),
        Capability.INFLIGHT: has(ProtocolFeature.INFLIGHT_SHMFD),
        Capability.STATE_RESET: has(ProtocolFeature.RESET_DEVICE) or has(ProtocolFeature.STATUS),
    }
    return frozenset(capability for capability, there in found.items() if there)
