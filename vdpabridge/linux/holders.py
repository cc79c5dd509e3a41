"""Which processes hold a device node open."""

from __future__ import annotations

import os
import stat

__all__ = ["Holder", "holders"]


class Holder:
    """A process with the node open: its ``pid`` and the name of its ``command``."""

    # a plain class, as `BusDevice` is: dataclasses and typing cost more than the rest of a command's start
    __slots__ = ("command", "pid")

    def __init__(self, pid: int, command: str) -> None:
        self.pid = pid
        self.command = command

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


def holders(path: str) -> list[Holder]:
    """The processes that have the device at ``path`` open or mapped, as far as this user may look; all for root.

    A descriptor in flight between processes (SCM_RIGHTS) is not seen.
    """
    try:
        wanted = os.stat(path)
    except OSError:
        return []
    if not (stat.S_ISCHR(wanted.st_mode) or stat.S_ISBLK(wanted.st_mode)):
        return []
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (_has_open(entry, wanted) or _has_mapped(entry, wanted)):
            found.append(Holder(int(entry), _command(entry)))
    return sorted(found, key=lambda holder: holder.pid)


def _has_open(pid: str, wanted: os.stat_result) -> bool:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # gone, or another user's
        return False
    for descriptor in descriptors:
        link = f"/proc/{pid}/fd/{descriptor}"
        try:
            if os.readlink(link).startswith("/dev/"):
                found = os.stat(link)
                # a block device may have the same number as a character device
                if found.st_rdev == wanted.st_rdev and stat.S_IFMT(found.st_mode) == stat.S_IFMT(wanted.st_mode):
                    return True
        except OSError:  # closed meanwhile
            continue
    return False


def _has_mapped(pid: str, wanted: os.stat_result) -> bool:
    """Whether it is mapped: a doorbell stays mapped, and keeps the device open, after the descriptor is closed."""
    place = f" {os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x} {wanted.st_ino} ".encode()
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            return any(place in line for line in maps)
    except OSError:  # gone, or another user's
        return False


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()
    except OSError:
        return "a process that just ended"
