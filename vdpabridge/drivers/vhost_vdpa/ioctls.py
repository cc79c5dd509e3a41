"""Every request that the driver makes: one row each. What it carries, and its number, is in `vdpabridge.abi.vhost`.

Source: drivers/vhost/vdpa.c and vhost.c, drivers/vdpa/*, read at 6.1, 6.12 and 7.2; for device state the proposal in
vm-images/kernel/patches.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ...abi.vhost import (
    VHOST_BACKEND_F_DESC_ASID,
    VHOST_BACKEND_F_DEVICE_STATE,
    VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK,
    VHOST_BACKEND_F_IOTLB_ASID,
    VHOST_BACKEND_F_RESUME,
    VHOST_BACKEND_F_SUSPEND,
    VhostIoctl as Ioctl,
)
from ...device import Capability

__all__ = ["ANY", "ROWS", "Meanings", "Row"]

Meanings = Mapping[int, tuple[str, str]]
"""errno -> (why, what to do)."""

_NOT_OWNER = "this process is not the device's owner, or has replaced its memory by execve"


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of a request."""

    asks_only: bool
    """Whether a forked child may make it. The kernel would let a child reset the device, which works for its parent."""
    feature: int | None = None
    """The bit of GET_BACKEND_FEATURES without which the kernel refuses it."""
    capability: Capability | None = None
    """What a device with that bit can do."""
    meanings: Meanings = field(default_factory=lambda: MappingProxyType({}))
    """What its errnos usually mean, beside those of `ANY`."""


ROWS: Mapping[Ioctl, Row] = {
    Ioctl.VHOST_GET_FEATURES: Row(asks_only=True),
    Ioctl.VHOST_SET_FEATURES: Row(
        asks_only=False,
        meanings={
            errno.EBUSY: ("features are already accepted", "reset the device first"),
            errno.EINVAL: (
                "the device refused these features; most insist on ACCESS_PLATFORM (bit 33)",
                "accept a subset of what it offers",
            ),
        },
    ),
    Ioctl.VHOST_SET_OWNER: Row(
        asks_only=False,
        meanings={
            errno.EBUSY: (
                "the device has an owner already",
                "another process passed the open file on: open the node again",
            ),
        },
    ),
    Ioctl.VHOST_SET_VRING_NUM: Row(
        asks_only=False,
        meanings={
            errno.EINVAL: (
                "the ring size is 0, not a power of two, or more than the device's maximum",
                "use a power of two up to queue_size_max",
            ),
        },
    ),
    Ioctl.VHOST_SET_VRING_ADDR: Row(
        asks_only=False,
        meanings={
            errno.EINVAL: (
                "an address is misaligned (avail 2, used 4 bytes), or the device runs",
                "align the ring; suspend or reset a running device first",
            ),
            errno.EOPNOTSUPP: ("an unknown flag", "vhost-vdpa knows only the dirty log's flag"),
        },
    ),
    Ioctl.VHOST_SET_VRING_BASE: Row(
        asks_only=False,
        meanings={
            errno.EINVAL: (
                "the index does not fit, the device runs, or it has started the queue",
                "set bases before start()",
            ),
            errno.EOPNOTSUPP: (
                "this parent (vp_vdpa, eni, snet with old firmware) can only start a queue at its beginning",
                "move this device's queues only while they are empty and fresh",
            ),
        },
    ),
    Ioctl.VHOST_GET_VRING_BASE: Row(
        asks_only=False,
        meanings={
            errno.EOPNOTSUPP: (
                "this parent (vp_vdpa, eni, snet with old firmware) cannot say where its queues stand",
                "take the used index from guest memory, which is right only for a drained queue",
            ),
            errno.EINVAL: (
                "this parent (pds) answers only for a queue that is not enabled",
                "it tells positions before start() and after a reset, not of a running queue",
            ),
        },
    ),
    Ioctl.VHOST_SET_VRING_KICK: Row(
        asks_only=False,
        meanings={
            errno.EBADF: ("not an open descriptor", "pass an eventfd"),
            errno.EINVAL: ("the descriptor is not an eventfd", "pass an eventfd"),
        },
    ),
    Ioctl.VHOST_SET_VRING_CALL: Row(
        asks_only=False,
        meanings={
            errno.EBADF: ("not an open descriptor", "pass an eventfd"),
            errno.EINVAL: ("the descriptor is not an eventfd", "pass an eventfd"),
        },
    ),
    Ioctl.VHOST_SET_VRING_ERR: Row(
        asks_only=False,
        meanings={
            errno.EBADF: ("not an open descriptor", "pass an eventfd"),
            errno.EINVAL: ("the descriptor is not an eventfd", "pass an eventfd"),
        },
    ),
    Ioctl.VHOST_SET_BACKEND_FEATURES: Row(
        asks_only=False,
        meanings={
            errno.EOPNOTSUPP: ("a backend feature that the device does not offer", "mask with what it offers"),
            errno.EINVAL: ("DESC_ASID needs IOTLB_ASID", "accept both or neither"),
        },
    ),
    Ioctl.VHOST_GET_BACKEND_FEATURES: Row(asks_only=True),
    Ioctl.VHOST_VDPA_GET_DEVICE_ID: Row(asks_only=True),
    Ioctl.VHOST_VDPA_GET_STATUS: Row(asks_only=True),
    Ioctl.VHOST_VDPA_SET_STATUS: Row(
        asks_only=False,
        meanings={
            errno.EINVAL: (
                "the write would clear a status bit that is set",
                "only a reset clears status bits; NEEDS_RESET comes from the device itself",
            ),
        },
    ),
    Ioctl.VHOST_VDPA_GET_CONFIG: Row(
        asks_only=True,
        meanings={
            errno.EINVAL: ("outside the configuration space, or no bytes", "see config_size_bytes"),
        },
    ),
    Ioctl.VHOST_VDPA_SET_CONFIG: Row(
        asks_only=False,
        meanings={
            errno.EINVAL: ("outside the configuration space, or no bytes", "see config_size_bytes"),
        },
    ),
    Ioctl.VHOST_VDPA_SET_VRING_ENABLE: Row(
        asks_only=False, feature=VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK, capability=Capability.ENABLE_WHILE_RUNNING
    ),
    Ioctl.VHOST_VDPA_GET_VRING_NUM: Row(asks_only=True),
    Ioctl.VHOST_VDPA_SET_CONFIG_CALL: Row(
        asks_only=False,
        meanings={
            errno.EBADF: ("not an open descriptor", "pass an eventfd"),
            errno.EINVAL: ("the descriptor is not an eventfd", "pass an eventfd"),
        },
    ),
    Ioctl.VHOST_VDPA_GET_IOVA_RANGE: Row(asks_only=True),
    Ioctl.VHOST_VDPA_GET_CONFIG_SIZE: Row(asks_only=True),
    Ioctl.VHOST_VDPA_GET_AS_NUM: Row(asks_only=True),
    Ioctl.VHOST_VDPA_GET_VRING_GROUP: Row(
        asks_only=False,
        meanings={
            errno.EIO: ("the device names a group that it does not have", "its driver is wrong"),
            errno.EOPNOTSUPP: ("this device has no queue groups", "all its queues are in one"),
        },
    ),
    Ioctl.VHOST_VDPA_SET_GROUP_ASID: Row(
        asks_only=False,
        feature=VHOST_BACKEND_F_IOTLB_ASID,
        meanings={
            errno.EINVAL: ("no such group or address space", "see group_count and address_space_count"),
            errno.ENOBUFS: ("no such group", "see group_count"),
            errno.EBUSY: ("the device runs", "assign groups before start()"),
            errno.EOPNOTSUPP: ("this device has one address space only", "leave it at 0"),
        },
    ),
    Ioctl.VHOST_VDPA_SUSPEND: Row(
        asks_only=False,
        feature=VHOST_BACKEND_F_SUSPEND,
        capability=Capability.SUSPEND,
        meanings={
            errno.EOPNOTSUPP: ("this device cannot suspend", "only a reset stops it"),
        },
    ),
    Ioctl.VHOST_VDPA_RESUME: Row(
        asks_only=False,
        feature=VHOST_BACKEND_F_RESUME,
        capability=Capability.RESUME,
        meanings={
            errno.EOPNOTSUPP: ("this device cannot resume", "reset it and set it up again"),
        },
    ),
    Ioctl.VHOST_VDPA_GET_VRING_DESC_GROUP: Row(
        asks_only=False,
        feature=VHOST_BACKEND_F_DESC_ASID,
        meanings={
            errno.EIO: ("the device names a group that it does not have", "its driver is wrong"),
            errno.EOPNOTSUPP: ("this device has no descriptor groups", "descriptors share the queue's group"),
        },
    ),
    Ioctl.VHOST_VDPA_GET_VQS_COUNT: Row(asks_only=True),
    Ioctl.VHOST_VDPA_GET_GROUP_NUM: Row(asks_only=True),
    Ioctl.VHOST_VDPA_GET_VRING_SIZE: Row(
        asks_only=False,
        meanings={
            errno.EOPNOTSUPP: ("this device has one maximum for all queues", "see queue_size_max"),
        },
    ),
    Ioctl.VHOST_VDPA_SET_DEVICE_STATE_FD: Row(
        asks_only=False,
        feature=VHOST_BACKEND_F_DEVICE_STATE,
        meanings={
            errno.EBUSY: (
                "the device runs, or a transfer of its state was not checked",
                "suspend the device; check or abandon the other transfer",
            ),
            errno.EINVAL: ("the kernel knows no such transfer", "save or load, with the device stopped"),
            errno.EOPNOTSUPP: ("this device cannot give or take its state", "move it only if it has none that matters"),
            errno.EMFILE: ("this process has too many descriptors open", "raise its limit (RLIMIT_NOFILE)"),
        },
    ),
    Ioctl.VHOST_VDPA_CHECK_DEVICE_STATE: Row(
        asks_only=False,
        feature=VHOST_BACKEND_F_DEVICE_STATE,
        meanings={
            errno.EBUSY: ("the state was not read to its end, or its writer has not closed it", "do so first"),
            errno.EINVAL: ("there is no transfer, or the state is not this kind of device's", "look at both devices"),
            errno.ECANCELED: ("the device was resumed, started or reset meanwhile", "begin again"),
            errno.EPIPE: ("not all of the state was read", "begin again"),
            errno.EFBIG: ("it is longer than any state of this device", "it is not this device's, or damaged"),
            errno.E2BIG: ("there is more in it than this device can have", "it is not this device's, or damaged"),
            errno.EBADMSG: ("the state is damaged, or not this kind of device's", "save it again"),
            errno.ENODATA: ("the state ends too early", "save it again"),
            errno.EOPNOTSUPP: ("the state is of a version that this device does not know", "use the same version"),
            errno.ESTALE: ("it names something that this device does not have", "give both devices the same content"),
        },
    ),
}

#: What an errno means for any request.
ANY: Meanings = {
    errno.EPERM: (_NOT_OWNER, "only the process that opened the device can do this; open it there"),
    errno.ENOBUFS: ("the device has no such queue", "queues are numbered from 0; see queue_count"),
    errno.ENOTTY: (
        "this kernel's vhost-vdpa does not know the request",
        "abi/vhost.py says which release added it",
    ),
    errno.ENODEV: ("the device is gone", "it was removed or unbound; look at the kernel log"),
    errno.EIO: ("the device's user-space daemon does not answer, or its firmware failed", "look at the kernel log"),
    errno.ENOMEM: ("the kernel has no memory for this", "free some"),
}
