"""What an errno from vhost-vdpa usually means, and what to do: for open(2) here, for requests in their rows."""

from __future__ import annotations

import errno

from ...abi.vhost import VhostIoctl as Ioctl
from ...errors import ENOTSUPP
from .ioctls import ANY, ROWS

__all__ = ["explain"]

_OPEN_MEANINGS: dict[int, tuple[str, str]] = {
    errno.ENOENT: (
        "no such node",
        "'vdpabridge list' shows the devices; 'vdpabridge bind NAME vhost_vdpa' makes the node",
    ),
    errno.EACCES: ("no permission", "be root, or be in group kvm with the rules of 'vdpabridge udev-rules' installed"),
    errno.EPERM: ("no permission", "this sandbox or device cgroup does not allow the node"),
    errno.EBUSY: ("another process holds the device", "end it first"),
    errno.ENXIO: ("the node is stale: no device is behind it", "'vdpabridge list' shows the devices"),
    errno.ENODEV: ("the node is stale: no device is behind it", "'vdpabridge list' shows the devices"),
    errno.EIO: ("the device did not answer the reset that opening it causes", "look at its daemon, or the kernel log"),
    errno.ENOTTY: ("not a vhost-vdpa node", "'vdpabridge list' shows the nodes"),
    ENOTSUPP: ("the device needs a cache-coherent IOMMU, and there is none", "enable the IOMMU in firmware and kernel"),
}


def explain(request: Ioctl | int | str, code: int) -> tuple[str, str]:
    """(why, what to do) for ``code`` from ``request``, an ioctl or ``"open"``; empty strings if nothing is known."""
    if request == "open":
        return _OPEN_MEANINGS.get(code, ("", ""))
    if isinstance(request, Ioctl) and request in ROWS and (known := ROWS[request].meanings.get(code)):
        return known
    return ANY.get(code, ("", ""))
