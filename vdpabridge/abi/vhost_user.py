"""vhost-user: requests, protocol features, flags and payload layouts. Byte order and alignment are the machine's own.

Source: docs/interop/vhost-user.rst and hw/virtio/vhost-user.c of QEMU, September 2026.
"""

from __future__ import annotations

from enum import IntEnum

from .layout import Layout

__all__ = [
    "CONFIG_SIZE_MAX",
    "DEVICE_STATE_NO_FD",
    "FLAG_NEED_REPLY",
    "FLAG_REPLY",
    "HEADER",
    "MEMORY_REGIONS_MAX",
    "PAYLOAD_SIZE_MAX",
    "REPLY_FLAGS",
    "SHMEM_REGIONS",
    "VERSION",
    "VERSION_MASK",
    "VHOST_USER_F_PROTOCOL_FEATURES",
    "VRING_INDEX_MASK",
    "VRING_NO_FD",
    "BackendRequest",
    "ConfigFlags",
    "FrontendRequest",
    "ProtocolFeature",
]

#: The virtio feature bit that says that protocol features can be negotiated. It is never for a guest.
VHOST_USER_F_PROTOCOL_FEATURES = 30

VERSION = 1
VERSION_MASK = 0x3
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8
#: The flags that QEMU requires in every reply: version 1 and REPLY, without NEED_REPLY.
REPLY_FLAGS = VERSION | FLAG_REPLY

#: In the word of SET_VRING_KICK, CALL and ERR: the queue, and "no descriptor comes with this".
VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 0x100
#: In the reply to SET_DEVICE_STATE_FD: "no descriptor comes with this, use yours". Bits 0 to 7 are the error.
DEVICE_STATE_NO_FD = 0x100

#: QEMU's limit; to QEMU a reply of another size is an error.
CONFIG_SIZE_MAX = 256
#: Regions in one memory table, without CONFIGURE_MEM_SLOTS.
MEMORY_REGIONS_MAX = 8
SHMEM_REGIONS = 256
#: rust-vmm's limit, and more than any message needs (2056 is the largest: GET_SHMEM_CONFIG).
PAYLOAD_SIZE_MAX = 4096


class ProtocolFeature(IntEnum):
    """Bit numbers of GET/SET_PROTOCOL_FEATURES."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    NET_MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19  # QEMU 8.2
    GET_VRING_BASE_INFLIGHT = 20  # QEMU 11.0; all posted series of SHMEM had this bit
    GPA_ADDRESSES = 21  # QEMU, 2026; rust-vmm's vhost before 0.17 means SHMEM by it
    SHMEM = 22  # QEMU 588acb45c29f, 2026-06
    GET_VRING_BASE_SKIP_DRAIN = 23  # QEMU 1276e6c85dcc, 2026-09


class FrontendRequest(IntEnum):
    """Requests of the front-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44  # a proposal for libvhost-server has SKIP_DRAIN here
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(IntEnum):
    """Requests of the back-end, on the socket that SET_BACKEND_REQ_FD gives it."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ConfigFlags(IntEnum):
    """Flags of GET_CONFIG and SET_CONFIG. QEMU's values; rust-vmm has LIVE_MIGRATION as 2."""

    GUEST_WRITE = 0
    LIVE_MIGRATION = 1


HEADER = Layout("VhostUserHeader", "=", (("request", "I"), ("flags", "I"), ("size", "I")))
