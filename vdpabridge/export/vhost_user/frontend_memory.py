"""The front-end's memory: its regions in the device, and its user addresses translated to the guest's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ...abi.vhost_user_payloads import Region
from ...device import Device, MemoryRegion
from ...device.checks import overlap
from ...errors import VdpaBridgeError
from .offer import MEMORY_SLOTS

__all__ = ["FrontendMemory"]


@dataclass(frozen=True, slots=True)
class _Known:
    region: Region
    mapped: MemoryRegion
    file: tuple[int, int]
    """Device and inode number: the same file comes as another descriptor each time."""

    def same_mapping(self, region: Region, file: tuple[int, int]) -> bool:
        mine = self.region
        return (
            file == self.file
            and mine.guest_address == region.guest_address
            and mine.size_bytes == region.size_bytes
            and mine.mmap_offset == region.mmap_offset
        )


class FrontendMemory:
    """The memory that a front-end has shared with ``device`` (borrowed). Descriptors are borrowed too."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._known: list[_Known] = []

    def lost_by(self, regions: Sequence[Region], fds: Sequence[int]) -> list[Region]:
        """The regions that `replace` would unmap from the device."""
        wanted = [_known(region, fd) for region, fd in zip(regions, fds, strict=True)]
        return [old.region for old in self._known if not any(old.same_mapping(new.region, new.file) for new in wanted)]

    def replace(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        """Replace the whole table. Regions that do not change stay mapped: a running device needs them."""
        wanted = [_known(region, fd) for region, fd in zip(regions, fds, strict=True)]
        _check([each.region for each in wanted])
        kept = [old for old in self._known if any(old.same_mapping(new.region, new.file) for new in wanted)]
        gone = [old for old in self._known if old not in kept]
        new = [each for each in wanted if not any(old.same_mapping(each.region, each.file) for old in kept)]
        if gone:
            self._unmap(gone)
            self._known = kept
        if new:
            self._device.map([each.mapped for each in new])
        self._known = wanted

    def add(self, region: Region, fd: int) -> None:
        """Add one region."""
        _check([*(each.region for each in self._known), region])
        if len(self._known) >= MEMORY_SLOTS:
            raise VdpaBridgeError("add a memory region", why=f"all {MEMORY_SLOTS} slots are in use")
        known = _known(region, fd)
        self._device.map([known.mapped])
        self._known.append(known)

    def remove(self, region: Region) -> None:
        """Remove the region with the same guest address, user address and size; the offset does not matter."""

        def key(each: Region) -> tuple[int, int, int]:
            return each.guest_address, each.user_address, each.size_bytes

        found = [each for each in self._known if key(each.region) == key(region)]
        if not found:
            why = f"there is no region of {region.size_bytes:#x} bytes at {region.guest_address:#x}"
            raise VdpaBridgeError("remove a memory region", why=why)
        self._unmap(found[:1])
        self._known.remove(found[0])

    def _unmap(self, regions: Sequence[_Known]) -> None:
        try:
            self._device.unmap([each.mapped for each in regions])
        except BaseException:
            # some may be unmapped all the same: keep those that the device still has
            mapped = {(region.guest_address, region.size_bytes) for region in self._device.regions}
            self._known = [
                each for each in self._known if (each.mapped.guest_address, each.mapped.size_bytes) in mapped
            ]
            raise

    def guest_address(self, user_address: int) -> int:
        """The guest address of the front-end's ``user_address``. Raises `VdpaBridgeError` if no region has it."""
        for each in self._known:
            offset = user_address - each.region.user_address
            if 0 <= offset < each.region.size_bytes:
                return each.region.guest_address + offset
        raise VdpaBridgeError("find a ring", why=f"no memory region has user address {user_address:#x}")

    def clear(self) -> None:
        """Unmap everything: the front-end is gone, and its memory with it."""
        self._known = []
        if self._device.regions:
            self._device.unmap(self._device.regions)


def _known(region: Region, fd: int) -> _Known:
    status = os.fstat(fd)
    mapped = MemoryRegion(region.guest_address, region.size_bytes, fd, region.mmap_offset)
    return _Known(region, mapped, (status.st_dev, status.st_ino))


def _check(regions: Sequence[Region]) -> None:
    """Raise `VdpaBridgeError` unless ``regions``, all that the front-end has, are valid."""
    for region in regions:
        starts = (("guest", region.guest_address), ("user", region.user_address), ("file", region.mmap_offset))
        for what, start in starts:
            if not 0 < region.size_bytes <= (1 << 64) - start:
                why = f"{region.size_bytes:#x} bytes at {what} address {start:#x}"
                raise VdpaBridgeError("map a memory region", why=why)
    for what, spans in (
        ("guest", [(region.guest_address, region.size_bytes) for region in regions]),
        ("user", [(region.user_address, region.size_bytes) for region in regions]),
    ):
        if (found := overlap(spans)) is not None:
            why = f"the one at {what} address {found[1]:#x} overlaps the one at {found[0]:#x}"
            raise VdpaBridgeError("map a memory region", why=why)
