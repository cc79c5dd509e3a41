"""Memory of ours that a device sees beside the guest's: available and used rings for it to work on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from ..abi.virtio_ring import VRING_AVAIL, VRING_USED, VRING_USED_ALIGN_SIZE, VRING_USED_ELEM
from ..device import Device, MemoryRegion, QueueSetup
from ..errors import VdpaBridgeError
from ..linux.mappings import SharedMapping, memory_file

__all__ = ["Arena"]

_PAGE_BYTES = 4096
_EVENT_BYTES = 2
#: Where the arena may be, for a device: far above all memory of guests, within what an IOMMU of 46, 39 or 36 bits
#: reaches. The first one that the device takes is used.
_PLACES = (1 << 45, 1 << 38, 1 << 35)


class Arena:
    """An available and a used ring for each queue of ``setups``, mapped into ``device``, which is borrowed.

    Raises what `Device.map` raises for the last place that was tried. Do not use its views after `close`.
    """

    def __init__(self, device: Device, setups: Mapping[int, QueueSetup]) -> None:
        self._device = device
        self._sizes = {index: setup.size for index, setup in setups.items()}
        self._offsets: dict[int, int] = {}
        size_bytes = 0
        for index, size in self._sizes.items():
            self._offsets[index] = size_bytes
            size_bytes += -(-(_used_offset(size) + _used_bytes(size)) // _PAGE_BYTES) * _PAGE_BYTES
        self._fd = memory_file("vdpabridge-rings", size_bytes, sealed=True)
        try:
            self._mapping = SharedMapping(self._fd, size_bytes)
            try:
                self._regions = _mapped(device, self._fd, size_bytes, {each.address_space for each in setups.values()})
            except BaseException:
                self._mapping.close()
                raise
        except BaseException:
            os.close(self._fd)
            raise

    def fits(self, setups: Mapping[int, QueueSetup]) -> bool:
        """Whether all of ``setups`` have a place in it."""
        return all(self._sizes.get(index) == setup.size for index, setup in setups.items())

    def setup(self, index: int, setup: QueueSetup) -> QueueSetup:
        """``setup`` of queue ``index`` with the rings in the arena; the descriptors stay where they are."""
        start = self._regions[0].guest_address + self._offsets[index]
        return replace(setup, avail_address=start, used_address=start + _used_offset(setup.size))

    def rings(self, index: int) -> tuple[memoryview, memoryview]:
        """The available and the used ring of queue ``index``, with their event indices."""
        size, start = self._sizes[index], self._offsets[index]
        used = start + _used_offset(size)
        return (
            self._mapping.view[start : start + _avail_bytes(size)],
            self._mapping.view[used : used + _used_bytes(size)],
        )

    def close(self) -> None:
        """Unmap it, also from the device, which must not work on it any more. Idempotent.

        If the device refuses, it stays as it is, and that error is raised.
        """
        if self._fd < 0:
            return
        start = self._regions[0].guest_address
        if mapped := [region for region in self._device.regions if region.guest_address == start]:
            self._device.unmap(mapped)
        fd, self._fd = self._fd, -1
        self._mapping.close()
        os.close(fd)


def _mapped(device: Device, fd: int, size_bytes: int, spaces: set[int]) -> list[MemoryRegion]:
    """The regions that ``device`` has mapped, one for each of ``spaces``, all at the same address."""
    errors: list[Exception] = []
    for address in _PLACES:
        regions = [MemoryRegion(address, size_bytes, fd, address_space=space) for space in sorted(spaces)]
        try:
            device.map(regions)
        except (VdpaBridgeError, ValueError, OSError) as error:
            errors.append(error)
        else:
            return regions
    raise errors[-1]


def _avail_bytes(size: int) -> int:
    return VRING_AVAIL.size_bytes + 2 * size + _EVENT_BYTES


def _used_bytes(size: int) -> int:
    return VRING_USED.size_bytes + VRING_USED_ELEM.size_bytes * size + _EVENT_BYTES


def _used_offset(size: int) -> int:
    return -(-_avail_bytes(size) // VRING_USED_ALIGN_SIZE) * VRING_USED_ALIGN_SIZE
