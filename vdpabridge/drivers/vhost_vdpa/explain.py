"""What an errno from vhost-vdpa usually means: (request, errno) -> (why, what to do). A table, no logic.

Source: drivers/vhost/vdpa.c and vhost.c, drivers/vdpa/*, read at 6.1, 6.12 and 7.2.
"""

from __future__ import annotations

import errno

from ...abi.vhost import VhostIoctl as Ioctl
from ...errors import ENOTSUPP

__all__ = ["explain"]

_ANY = None
_NOT_OWNER = "this process is not the device's owner, or has replaced its memory by execve"

_MEANINGS: dict[tuple[Ioctl | None, int], tuple[str, str]] = {
    (_ANY, errno.EPERM): (_NOT_OWNER, "only the process that opened the device can do this; open it there"),
    (_ANY, errno.ENOBUFS): ("the device has no such queue", "queues are numbered from 0; see queue_count"),
    (_ANY, errno.ENOTTY): (
        "this kernel's vhost-vdpa does not know the request",
        "see which release brought it in abi/vhost.py",
    ),
    (_ANY, errno.ENODEV): ("the device is gone", "it was removed or unbound; look at the kernel log"),
    (_ANY, errno.EIO): (
        "the device's user-space daemon does not answer, or its firmware failed",
        "look at the kernel log",
    ),
    (_ANY, errno.ENOMEM): ("the kernel has no memory for this", "free some"),
    (Ioctl.VHOST_SET_OWNER, errno.EBUSY): (
        "the device has an owner already",
        "the open file was handed over: open the node anew",
    ),
    (Ioctl.VHOST_SET_FEATURES, errno.EBUSY): ("features are already accepted", "reset the device first"),
    (Ioctl.VHOST_SET_FEATURES, errno.EINVAL): (
        "the device refused these features; most insist on ACCESS_PLATFORM (bit 33)",
        "accept a subset of what it offers",
    ),
    (Ioctl.VHOST_VDPA_SET_STATUS, errno.EINVAL): (
        "the write would clear a status bit that is set",
        "only a reset clears status bits; NEEDS_RESET comes from the device itself",
    ),
    (Ioctl.VHOST_SET_BACKEND_FEATURES, errno.EOPNOTSUPP): (
        "a backend feature that the device does not offer",
        "mask with what it offers",
    ),
    (Ioctl.VHOST_SET_BACKEND_FEATURES, errno.EINVAL): ("DESC_ASID needs IOTLB_ASID", "accept both or neither"),
    (Ioctl.VHOST_SET_VRING_NUM, errno.EINVAL): (
        "the ring size is 0, no power of two, or more than the device's maximum",
        "use a power of two up to queue_size_max",
    ),
    (Ioctl.VHOST_SET_VRING_ADDR, errno.EINVAL): (
        "an address is misaligned (avail 2, used 4 bytes), or the device runs",
        "align the ring; suspend or reset a running device first",
    ),
    (Ioctl.VHOST_SET_VRING_ADDR, errno.EOPNOTSUPP): ("an unknown flag", "vhost-vdpa knows no flag but the dirty log's"),
    (Ioctl.VHOST_SET_VRING_BASE, errno.EINVAL): (
        "the index does not fit, the device runs, or it has started the queue",
        "set bases before start()",
    ),
    (Ioctl.VHOST_SET_VRING_BASE, errno.EOPNOTSUPP): (
        "this parent (vp_vdpa, eni, snet with old firmware) can only start a queue at its beginning",
        "move this device's queues only while they are empty and fresh",
    ),
    (Ioctl.VHOST_GET_VRING_BASE, errno.EOPNOTSUPP): (
        "this parent (vp_vdpa, eni, snet with old firmware) cannot say where its queues stand",
        "take the used index from guest memory, which is right only for a drained queue",
    ),
    (Ioctl.VHOST_GET_VRING_BASE, errno.EINVAL): (
        "this parent (pds) answers only for a queue that is not enabled",
        "it tells positions before start() and after a reset, not of a running queue",
    ),
    (Ioctl.VHOST_SET_VRING_KICK, errno.EBADF): ("not an open descriptor", "pass an eventfd"),
    (Ioctl.VHOST_SET_VRING_KICK, errno.EINVAL): ("the descriptor is not an eventfd", "pass an eventfd"),
    (Ioctl.VHOST_SET_VRING_CALL, errno.EBADF): ("not an open descriptor", "pass an eventfd"),
    (Ioctl.VHOST_SET_VRING_CALL, errno.EINVAL): ("the descriptor is not an eventfd", "pass an eventfd"),
    (Ioctl.VHOST_SET_VRING_ERR, errno.EBADF): ("not an open descriptor", "pass an eventfd"),
    (Ioctl.VHOST_SET_VRING_ERR, errno.EINVAL): ("the descriptor is not an eventfd", "pass an eventfd"),
    (Ioctl.VHOST_VDPA_SET_CONFIG_CALL, errno.EBADF): ("not an open descriptor", "pass an eventfd"),
    (Ioctl.VHOST_VDPA_SET_CONFIG_CALL, errno.EINVAL): ("the descriptor is not an eventfd", "pass an eventfd"),
    (Ioctl.VHOST_VDPA_GET_CONFIG, errno.EINVAL): (
        "outside the configuration space, or no bytes",
        "see config_size_bytes",
    ),
    (Ioctl.VHOST_VDPA_SET_CONFIG, errno.EINVAL): (
        "outside the configuration space, or no bytes",
        "see config_size_bytes",
    ),
    (Ioctl.VHOST_VDPA_GET_VRING_GROUP, errno.EIO): (
        "the device names a group that it does not have",
        "its driver is wrong",
    ),
    (Ioctl.VHOST_VDPA_GET_VRING_DESC_GROUP, errno.EIO): (
        "the device names a group that it does not have",
        "its driver is wrong",
    ),
    (Ioctl.VHOST_VDPA_GET_VRING_GROUP, errno.EOPNOTSUPP): (
        "this device has no queue groups",
        "all its queues are in one",
    ),
    (Ioctl.VHOST_VDPA_GET_VRING_DESC_GROUP, errno.EOPNOTSUPP): (
        "this device has no descriptor groups",
        "descriptors share the queue's group",
    ),
    (Ioctl.VHOST_VDPA_SET_GROUP_ASID, errno.EINVAL): (
        "no such group or address space",
        "see group_count and address_space_count",
    ),
    (Ioctl.VHOST_VDPA_SET_GROUP_ASID, errno.ENOBUFS): ("no such group", "see group_count"),
    (Ioctl.VHOST_VDPA_SET_GROUP_ASID, errno.EBUSY): ("the device runs", "assign groups before start()"),
    (Ioctl.VHOST_VDPA_SET_GROUP_ASID, errno.EOPNOTSUPP): ("this device has one address space only", "leave it at 0"),
    (Ioctl.VHOST_VDPA_GET_VRING_SIZE, errno.EOPNOTSUPP): (
        "this device has one maximum for all queues",
        "see queue_size_max",
    ),
    (Ioctl.VHOST_VDPA_SUSPEND, errno.EOPNOTSUPP): ("this device cannot suspend", "only a reset stops it"),
    (Ioctl.VHOST_VDPA_RESUME, errno.EOPNOTSUPP): ("this device cannot resume", "reset it and set it up again"),
}

_OPEN_MEANINGS: dict[int, tuple[str, str]] = {
    errno.ENOENT: (
        "no such node",
        "'vdpabridge list' shows the devices; 'vdpabridge bind NAME vhost_vdpa' makes the node",
    ),
    errno.EACCES: ("no permission", "be root, or be in group kvm with the rules of 'vdpabridge udev-rules' installed"),
    errno.EPERM: ("no permission", "this sandbox or device cgroup does not admit the node"),
    errno.EBUSY: ("another process holds the device", "end it first"),
    errno.ENXIO: ("the node is stale: no device is behind it", "'vdpabridge list' shows the devices"),
    errno.ENODEV: ("the node is stale: no device is behind it", "'vdpabridge list' shows the devices"),
    errno.EIO: ("the device did not answer the reset that opening it means", "look at its daemon, or the kernel log"),
    errno.ENOTTY: ("not a vhost-vdpa node", "'vdpabridge list' shows the nodes"),
    ENOTSUPP: ("the device needs a cache-coherent IOMMU, and there is none", "enable the IOMMU in firmware and kernel"),
}


def explain(request: Ioctl | str, code: int) -> tuple[str, str]:
    """(why, what to do) for ``code`` from ``request``, an ioctl or ``"open"``; empty strings where nothing is known."""
    if request == "open":
        return _OPEN_MEANINGS.get(code, ("", ""))
    if isinstance(request, Ioctl) and (known := _MEANINGS.get((request, code))):
        return known
    return _MEANINGS.get((_ANY, code), ("", ""))
