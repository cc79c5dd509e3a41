"""vhost and vhost-vdpa: ioctls, structures, IOTLB messages, backend feature bits.

Source: include/uapi/linux/vhost.h and vhost_types.h of Linux 7.2. Byte order and alignment are the machine's own.
Device state is not in Linux: it is this project's proposal, in vm-images/kernel/patches.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum

from .ioc import IO, IOR, IOW, IOWR
from .layout import Layout

VHOST_VIRTIO = 0xAF
VHOST_FILE_UNBIND = -1
VHOST_VRING_LITTLE_ENDIAN = 0
VHOST_VRING_BIG_ENDIAN = 1
VHOST_VRING_F_LOG = 0
VHOST_PAGE_SIZE = 0x1000
VHOST_SCSI_ABI_VERSION = 1
VHOST_FORK_OWNER_KTHREAD = 0
VHOST_FORK_OWNER_TASK = 1

VHOST_F_LOG_ALL = 26
VHOST_NET_F_VIRTIO_NET_HDR = 27

# Bit numbers of GET/SET_BACKEND_FEATURES, with the release each came with.
VHOST_BACKEND_F_IOTLB_MSG_V2 = 1  # 5.9
VHOST_BACKEND_F_IOTLB_BATCH = 2  # 5.9
VHOST_BACKEND_F_IOTLB_ASID = 3  # 5.19
VHOST_BACKEND_F_SUSPEND = 4  # 6.0
VHOST_BACKEND_F_RESUME = 5  # 6.3
VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK = 6  # 6.6
VHOST_BACKEND_F_DESC_ASID = 7  # 6.7
VHOST_BACKEND_F_IOTLB_PERSIST = 8  # 6.7
VHOST_BACKEND_F_DEVICE_STATE = 60  # the proposal

#: Bit -> name of every backend feature that this release knows.
BACKEND_FEATURE_NAMES = {
    value: name.removeprefix("VHOST_BACKEND_F_")
    for name, value in list(globals().items())
    if name.startswith("VHOST_BACKEND_F_")
}

VHOST_ACCESS_RO = 1
VHOST_ACCESS_WO = 2
VHOST_ACCESS_RW = 3

VHOST_IOTLB_MISS = 1
VHOST_IOTLB_UPDATE = 2
VHOST_IOTLB_INVALIDATE = 3
VHOST_IOTLB_ACCESS_FAIL = 4
VHOST_IOTLB_BATCH_BEGIN = 5
VHOST_IOTLB_BATCH_END = 6
VHOST_IOTLB_MSG = 1
VHOST_IOTLB_MSG_V2 = 2

VHOST_VDPA_DEVICE_STATE_SAVE = 0
VHOST_VDPA_DEVICE_STATE_LOAD = 1
VHOST_VDPA_DEVICE_STATE_CANCEL = 2
VHOST_VDPA_DEVICE_STATE_STOPPED = 0

VHOST_VRING_STATE = Layout("vhost_vring_state", "=", (("index", "I"), ("num", "I")))
VHOST_VRING_FILE = Layout("vhost_vring_file", "=", (("index", "I"), ("fd", "i")))
VHOST_VRING_ADDR = Layout(
    "vhost_vring_addr",
    "=",
    (
        ("index", "I"),
        ("flags", "I"),
        ("desc_user_addr", "Q"),
        ("used_user_addr", "Q"),
        ("avail_user_addr", "Q"),
        ("log_guest_addr", "Q"),
    ),
)
VHOST_WORKER_STATE = Layout("vhost_worker_state", "=", (("worker_id", "I"),))
VHOST_VRING_WORKER = Layout("vhost_vring_worker", "=", (("index", "I"), ("worker_id", "I")))
_IOTLB_MEMBERS = (("iova", "Q"), ("size", "Q"), ("uaddr", "Q"), ("perm", "B"), ("type", "B"))
_IOTLB_IN_UNION = (*((f"iotlb.{name}", code) for name, code in _IOTLB_MEMBERS), ("", "38x"))
VHOST_IOTLB_MSG_LAYOUT = Layout("vhost_iotlb_msg", "=", (*_IOTLB_MEMBERS, ("", "6x")))
VHOST_MSG_LAYOUT = Layout("vhost_msg", "=", (("type", "i"), ("", "4x"), *_IOTLB_IN_UNION))
VHOST_MSG_V2_LAYOUT = Layout("vhost_msg_v2", "=", (("type", "I"), ("asid", "I"), *_IOTLB_IN_UNION))
VHOST_FEATURES_ARRAY = Layout("vhost_features_array", "=", (("count", "Q"),))
VHOST_MEMORY_REGION = Layout(
    "vhost_memory_region",
    "=",
    (("guest_phys_addr", "Q"), ("memory_size", "Q"), ("userspace_addr", "Q"), ("flags_padding", "Q")),
)
VHOST_MEMORY = Layout("vhost_memory", "=", (("nregions", "I"), ("padding", "I")))
VHOST_SCSI_TARGET = Layout(
    "vhost_scsi_target", "=", (("abi_version", "i"), ("vhost_wwpn", "224s"), ("vhost_tpgt", "H"), ("reserved", "H"))
)
#: ``struct vhost_vdpa_config`` up to ``buf``.
VHOST_VDPA_CONFIG = Layout("vhost_vdpa_config", "=", (("off", "I"), ("len", "I")))
VHOST_VDPA_IOVA_RANGE = Layout("vhost_vdpa_iova_range", "=", (("first", "Q"), ("last", "Q")))
VHOST_VDPA_DEVICE_STATE = Layout(
    "vhost_vdpa_device_state", "=", (("direction", "I"), ("phase", "I"), ("fd", "i"), ("flags", "I"))
)

_U8, _U16, _U32, _U64, _INT = (struct.Struct("=" + code) for code in "BHIQi")


class VhostIoctl(IntEnum):
    """Every vhost request by the name of its C macro. Linux 7.2; a comment names the release if it is newer than 5.7.

    The requests before VHOST_VDPA_GET_DEVICE_ID are those of vhost devices in general; vhost-vdpa refuses some of them.
    """

    carries: struct.Struct | None
    """What the request's argument points to; the bytes of the configuration space follow that."""

    def __new__(cls, direction: Callable[..., int], number: int, carries: struct.Struct | None = None) -> VhostIoctl:
        value = direction(VHOST_VIRTIO, number) if carries is None else direction(VHOST_VIRTIO, number, carries)
        member = int.__new__(cls, value)
        member._value_ = value
        member.carries = carries
        return member

    VHOST_GET_FEATURES = IOR, 0x00, _U64
    VHOST_SET_FEATURES = IOW, 0x00, _U64
    VHOST_SET_OWNER = IO, 0x01
    VHOST_RESET_OWNER = IO, 0x02
    VHOST_SET_MEM_TABLE = IOW, 0x03, VHOST_MEMORY.struct
    VHOST_SET_LOG_BASE = IOW, 0x04, _U64
    VHOST_SET_LOG_FD = IOW, 0x07, _INT
    VHOST_NEW_WORKER = IOR, 0x08, VHOST_WORKER_STATE.struct  # 6.5
    VHOST_FREE_WORKER = IOW, 0x09, VHOST_WORKER_STATE.struct  # 6.5
    VHOST_SET_VRING_NUM = IOW, 0x10, VHOST_VRING_STATE.struct
    VHOST_SET_VRING_ADDR = IOW, 0x11, VHOST_VRING_ADDR.struct
    VHOST_SET_VRING_BASE = IOW, 0x12, VHOST_VRING_STATE.struct
    VHOST_GET_VRING_BASE = IOWR, 0x12, VHOST_VRING_STATE.struct
    VHOST_SET_VRING_ENDIAN = IOW, 0x13, VHOST_VRING_STATE.struct
    VHOST_GET_VRING_ENDIAN = IOW, 0x14, VHOST_VRING_STATE.struct
    VHOST_ATTACH_VRING_WORKER = IOW, 0x15, VHOST_VRING_WORKER.struct  # 6.5
    VHOST_GET_VRING_WORKER = IOWR, 0x16, VHOST_VRING_WORKER.struct  # 6.5
    VHOST_SET_VRING_KICK = IOW, 0x20, VHOST_VRING_FILE.struct
    VHOST_SET_VRING_CALL = IOW, 0x21, VHOST_VRING_FILE.struct
    VHOST_SET_VRING_ERR = IOW, 0x22, VHOST_VRING_FILE.struct
    VHOST_SET_VRING_BUSYLOOP_TIMEOUT = IOW, 0x23, VHOST_VRING_STATE.struct
    VHOST_GET_VRING_BUSYLOOP_TIMEOUT = IOW, 0x24, VHOST_VRING_STATE.struct
    VHOST_SET_BACKEND_FEATURES = IOW, 0x25, _U64  # 5.9 on vhost-vdpa
    VHOST_GET_BACKEND_FEATURES = IOR, 0x26, _U64  # 5.9 on vhost-vdpa
    VHOST_NET_SET_BACKEND = IOW, 0x30, VHOST_VRING_FILE.struct
    VHOST_SCSI_SET_ENDPOINT = IOW, 0x40, VHOST_SCSI_TARGET.struct
    VHOST_SCSI_CLEAR_ENDPOINT = IOW, 0x41, VHOST_SCSI_TARGET.struct
    VHOST_SCSI_GET_ABI_VERSION = IOW, 0x42, _INT
    VHOST_SCSI_SET_EVENTS_MISSED = IOW, 0x43, _U32
    VHOST_SCSI_GET_EVENTS_MISSED = IOW, 0x44, _U32
    VHOST_VSOCK_SET_GUEST_CID = IOW, 0x60, _U64
    VHOST_VSOCK_SET_RUNNING = IOW, 0x61, _INT
    VHOST_VDPA_GET_DEVICE_ID = IOR, 0x70, _U32
    VHOST_VDPA_GET_STATUS = IOR, 0x71, _U8
    VHOST_VDPA_SET_STATUS = IOW, 0x72, _U8
    VHOST_VDPA_GET_CONFIG = IOR, 0x73, VHOST_VDPA_CONFIG.struct
    VHOST_VDPA_SET_CONFIG = IOW, 0x74, VHOST_VDPA_CONFIG.struct
    VHOST_VDPA_SET_VRING_ENABLE = IOW, 0x75, VHOST_VRING_STATE.struct
    VHOST_VDPA_GET_VRING_NUM = IOR, 0x76, _U16
    VHOST_VDPA_SET_CONFIG_CALL = IOW, 0x77, _INT  # 5.8
    VHOST_VDPA_GET_IOVA_RANGE = IOR, 0x78, VHOST_VDPA_IOVA_RANGE.struct  # 5.10
    VHOST_VDPA_GET_CONFIG_SIZE = IOR, 0x79, _U32  # 5.18
    VHOST_VDPA_GET_AS_NUM = IOR, 0x7A, _U32  # 5.19
    VHOST_VDPA_GET_VRING_GROUP = IOWR, 0x7B, VHOST_VRING_STATE.struct  # 5.19
    VHOST_VDPA_SET_GROUP_ASID = IOW, 0x7C, VHOST_VRING_STATE.struct  # 5.19
    VHOST_VDPA_SUSPEND = IO, 0x7D  # 6.0
    VHOST_VDPA_RESUME = IO, 0x7E  # 6.3
    VHOST_VDPA_GET_VRING_DESC_GROUP = IOWR, 0x7F, VHOST_VRING_STATE.struct  # 6.7
    VHOST_VDPA_GET_VQS_COUNT = IOR, 0x80, _U32  # 5.18
    VHOST_VDPA_GET_GROUP_NUM = IOR, 0x81, _U32  # 5.19
    VHOST_VDPA_GET_VRING_SIZE = IOWR, 0x82, VHOST_VRING_STATE.struct  # 6.9
    VHOST_GET_FEATURES_ARRAY = IOR, 0x83, VHOST_FEATURES_ARRAY.struct  # 6.17
    VHOST_SET_FEATURES_ARRAY = IOW, 0x83, VHOST_FEATURES_ARRAY.struct  # 6.17
    VHOST_SET_FORK_FROM_OWNER = IOW, 0x84, _U8  # 6.17
    VHOST_GET_FORK_FROM_OWNER = IOR, 0x85, _U8  # 6.17
    VHOST_VDPA_SET_DEVICE_STATE_FD = IOWR, 0xE0, VHOST_VDPA_DEVICE_STATE.struct  # the proposal
    VHOST_VDPA_CHECK_DEVICE_STATE = IO, 0xE1  # the proposal


__all__ = [name for name in globals() if name.startswith(("VHOST_", "BACKEND_", "VhostIoctl"))]
