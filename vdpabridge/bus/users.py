"""How this kernel itself, or a process, uses a virtio device that is bound to virtio_vdpa.

The kernel takes a device away without waiting for its users: a mounted disk disappears from under its file system.
"""

from __future__ import annotations

import errno
import os

from ..linux.holders import holders

__all__ = ["users"]

_IFF_UP = 1


def users(folder: str, dev: str = "/dev") -> list[str]:
    """What uses the device in sysfs ``folder`` (``…/bus/vdpa/devices/NAME``), each in words; empty if nothing does.

    Disks that are mounted, claimed (device mapper, swap, RAID) or open, and network interfaces that are up.
    """
    found = []
    for child in _entries(folder):
        if child.startswith("virtio"):
            for disk in _entries(f"{folder}/{child}/block"):
                found += _users_of_disk(f"{folder}/{child}/block/{disk}", disk, dev)
            for interface in _entries(f"{folder}/{child}/net"):
                if _flags(f"{folder}/{child}/net/{interface}/flags") & _IFF_UP:
                    found.append(f"network interface {interface} is up")
    return found


def _users_of_disk(folder: str, disk: str, dev: str) -> list[str]:
    parts = [entry for entry in _entries(folder) if entry.startswith(disk)]
    found = [
        f"{name} is open in {', '.join(map(str, who))}" for name in (disk, *parts) if (who := holders(f"{dev}/{name}"))
    ]
    try:
        # mounting a disk, or a part of it, claims the disk, whatever the namespace is
        os.close(os.open(f"{dev}/{disk}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            found.append(f"{disk} is mounted, or claimed in another way")
    return found


def _flags(path: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read(), 16)
    except (OSError, ValueError):  # removed meanwhile
        return 0


def _entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # no such folder
        return []
