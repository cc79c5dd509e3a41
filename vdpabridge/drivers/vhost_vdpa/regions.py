"""Guest memory in a vhost-vdpa device: each region mapped into this process, and from here into the IOTLB."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence

from ...device import MemoryRegion
from ...errors import DeadlineExceeded, KernelError, OwnershipError
from ...memory import SharedMapping
from .iotlb import Iotlb, MappingError

__all__ = ["Regions"]

#: The size that, from IOVA 0, covers all: 0 for "everything" is refused from 7.3 on.
_EVERYTHING_BYTES = (1 << 64) - 1


class Regions:
    """What is mapped through ``iotlb`` (borrowed). Owns the mappings into this process."""

    def __init__(self, device: str, iotlb: Iotlb) -> None:
        self._device = device
        self._iotlb = iotlb
        self._mappings: dict[tuple[int, int], tuple[SharedMapping, bool]] = {}
        """(address space, guest address) -> mapping, whether the device may write there."""

    def map(self, regions: Sequence[MemoryRegion]) -> None:
        """Map all of ``regions`` or none. Raises `MappingError`, `KernelError`, OSError as mmap(2) does."""
        done: list[MemoryRegion] = []
        try:
            for space, its_regions in _by_space(regions):
                with self._together(space, len(its_regions)):
                    for region in its_regions:
                        self._map_one(region)
                        done.append(region)
        except BaseException:
            # what cannot be taken back stays in the books until close
            with contextlib.suppress(KernelError, DeadlineExceeded, OwnershipError):
                self.unmap(done)
            raise

    def unmap(self, regions: Sequence[MemoryRegion]) -> None:
        """Take ``regions``, which are mapped, away."""
        for space, its_regions in _by_space(regions):
            with self._together(space, len(its_regions)):
                for region in its_regions:
                    self._iotlb.invalidate(region.guest_address, region.size_bytes, address_space=space)
        # only now: until a batch ends the device still uses what it covers
        for region in regions:
            self._mappings.pop((region.address_space, region.guest_address))[0].close()

    def map_again(self) -> None:
        """Show the device everything once more, after a reset that made it forget but not vhost."""
        for (space, address), (mapping, writable) in self._mappings.items():
            self._iotlb.invalidate(address, mapping.size_bytes, address_space=space)
            where = (address, mapping.size_bytes, mapping.address)
            self._iotlb.update(*where, writable=writable, address_space=space, known_shared=True)

    def forget_everything(self) -> None:
        """Take all away from the device, whatever it is."""
        for space in {space for space, _ in self._iotlb.entries}:
            self._iotlb.invalidate(0, _EVERYTHING_BYTES, address_space=space)

    def close(self) -> None:
        """Unmap from this process. The device must be closed, or have forgotten everything. Idempotent."""
        for mapping, _ in self._mappings.values():
            mapping.close()
        self._mappings = {}

    def _together(self, space: int, count: int) -> contextlib.AbstractContextManager[None]:
        """A batch where there is more than one change: the failure of a single one is reported, of a batch not."""
        return self._iotlb.batch(space) if count > 1 else contextlib.nullcontext()

    def _map_one(self, region: MemoryRegion) -> None:
        what = f"map {region.size_bytes} bytes at {region.guest_address:#x}"
        file_bytes = os.fstat(region.fd).st_size
        if region.offset + region.size_bytes > file_bytes:
            raise MappingError(what, device=self._device, why=f"the file behind it has only {file_bytes} bytes")
        if fcntl.fcntl(region.fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            # also for a region that the device may only read: shared memory of such a descriptor is none to the kernel
            raise MappingError(what, device=self._device, why="its descriptor is not open for reading and writing")
        mapping = SharedMapping(region.fd, region.size_bytes, region.offset)
        try:
            where = (region.guest_address, region.size_bytes, mapping.address)
            self._iotlb.update(*where, writable=region.writable, address_space=region.address_space, known_shared=True)
        except BaseException:
            mapping.close()
            raise
        self._mappings[region.address_space, region.guest_address] = (mapping, region.writable)


def _by_space(regions: Sequence[MemoryRegion]) -> Iterator[tuple[int, list[MemoryRegion]]]:
    for space in sorted({region.address_space for region in regions}):
        yield space, [region for region in regions if region.address_space == space]
