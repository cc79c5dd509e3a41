"""Which memory of this process the kernel maps into a device, and why it may refuse some."""

from __future__ import annotations

import os
import resource

__all__ = ["causes_of_refusal", "private_part"]

#: The most entries of an address space, if sysfs does not tell.
_ENTRIES_MAX = 2048
_ENTRIES_MAX_PATH = "/sys/module/vhost_vdpa/parameters/max_iotlb_entries"


def private_part(address: int, size: int) -> int | None:
    """The first address of the range that is not in a shared, writable mapping of a file; None if all of it is.

    A mapping of a file that was opened for reading only appears as shared but is not (mm/mmap.c clears VM_SHARED): the
    kernel would skip it like private memory. A writable mapping cannot be of that kind.
    """
    position, end = address, address + size
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            span, permissions, _offset, _device, inode = line.split(maxsplit=5)[:5]
            start, stop = (int(part, 16) for part in span.split("-"))
            if stop <= position:
                continue
            if start > position or permissions[1] + permissions[3] != "ws" or inode == "0":
                return position
            position = stop
            if position >= end:
                return None
    return position


def causes_of_refusal(size_bytes: int, entry_count: int) -> list[str]:
    """What EFAULT can mean for an entry of ``size_bytes``, in an address space that has ``entry_count``."""
    causes = []
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    needed = size_bytes + _pinned_bytes()
    if limit != resource.RLIM_INFINITY and needed > limit:
        # no exemption for root: CAP_IPC_LOCK does not help (vhost_vdpa_pa_map)
        causes.append(f"locked memory, if pages are pinned: {needed} bytes needed, limit {limit} ('ulimit -l')")
    causes += [
        f"too many entries: {entry_count} now, vhost_vdpa.max_iotlb_entries is {_entries_max()}, and pinned memory "
        "counts once for each piece that is contiguous",
        "a file on ext4, xfs or another file system on a disk, which cannot be pinned for long (use a memfd)",
        "something is already mapped there, by a message that this process does not know of",
        "the owner's memory was replaced by execve",
        "the device refused it",
    ]
    return causes


def _entries_max() -> int:
    try:
        with open(_ENTRIES_MAX_PATH, encoding="ascii") as parameter:
            return int(parameter.read())
    except (OSError, ValueError):
        return _ENTRIES_MAX


def _pinned_bytes() -> int:
    with open(f"/proc/{os.getpid()}/status", encoding="ascii", errors="replace") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmPin:")), 0)
