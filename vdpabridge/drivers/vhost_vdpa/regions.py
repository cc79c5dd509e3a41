"""Guest memory in a vhost-vdpa device: each region mapped into this process, and from here into the IOTLB."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence

from ...device import MemoryRegion
from ...errors import DeadlineExceeded, KernelError, OwnershipError
from ...linux.mappings import SharedMapping, check_inside
from .iotlb import Iotlb, IotlbBroken, MappingError

__all__ = ["Regions"]

#: The size that covers everything from IOVA 0: from 7.3 on, the kernel refuses 0 for "everything".
_EVERYTHING_BYTES = (1 << 64) - 1


class Regions:
    """What is mapped through ``iotlb`` (borrowed). Owns the mappings into this process."""

    def __init__(self, device: str, iotlb: Iotlb) -> None:
        self._device = device
        self._iotlb = iotlb
        self._mappings: dict[tuple[int, int], tuple[SharedMapping, bool]] = {}
        """(address space, guest address) -> mapping, whether the device may write there."""
        self._leaving: list[SharedMapping] = []
        """Mappings that the device may still have, and that have to be taken away."""

    def map(self, regions: Sequence[MemoryRegion]) -> None:
        """Map all of ``regions`` or none.

        Raises `MappingError`, `KernelError`, `IotlbBroken`, OSError as mmap(2) does.
        """
        self.settle()
        done: list[MemoryRegion] = []
        try:
            for space, its_regions in _by_space(regions):
                with self._batch_of(space, len(its_regions)):
                    for region in its_regions:
                        self._map_one(region)
                        done.append(region)
        except BaseException:
            self._give_up(done)
            raise

    def unmap(self, regions: Sequence[MemoryRegion]) -> None:
        """Unmap ``regions``, which are mapped. If this raises, they count as unmapped, and `settle` unmaps them."""
        try:
            self.settle()
            for space, its_regions in _by_space(regions):
                with self._batch_of(space, len(its_regions)):
                    for region in its_regions:
                        self._iotlb.invalidate(region.guest_address, region.size_bytes, address_space=space)
        except BaseException:
            self._give_up(regions)
            raise
        # only now: until a batch ends the device still uses what it covers
        for region in regions:
            self._mappings.pop(_key(region))[0].close()

    def settle(self) -> None:
        """Unmap what may be left of a change that did not complete. Raises as `Iotlb.repair` does."""
        self._iotlb.repair()
        while self._leaving:
            self._leaving.pop().close()

    def map_again(self) -> None:
        """Map everything into the device again, after a reset: the device has forgotten it, vhost has not."""
        self.settle()
        for space in sorted({space for space, _ in self._mappings}):
            mine = {address: it for (its_space, address), it in self._mappings.items() if its_space == space}
            with self._batch_of(space, len(mine)):
                for address, (mapping, writable) in mine.items():
                    self._iotlb.invalidate(address, mapping.size_bytes, address_space=space)
                    where = (address, mapping.size_bytes, mapping.address)
                    self._iotlb.update(*where, writable=writable, address_space=space, known_shared=True)

    def map_missing(self) -> None:
        """Map what the device should have but lacks, because `map_again` did not complete."""
        self.settle()
        for (space, address), (mapping, writable) in self._mappings.items():
            if (space, address) not in self._iotlb.entries:
                where = (address, mapping.size_bytes, mapping.address)
                self._iotlb.update(*where, writable=writable, address_space=space, known_shared=True)

    def _give_up(self, regions: Sequence[MemoryRegion]) -> None:
        """Unmap ``regions``, now or before anything else is mapped or unmapped.

        This process keeps them mapped until then: the kernel may still be looking up, and pinning, what is there.
        """
        self._iotlb.doubt([_key(region) for region in regions])
        for region in regions:
            if (found := self._mappings.pop(_key(region), None)) is not None:
                self._leaving.append(found[0])
        with contextlib.suppress(KernelError, DeadlineExceeded, OwnershipError, IotlbBroken):
            self.settle()

    def forget_everything(self) -> None:
        """Unmap everything from the device."""
        self._iotlb.repair()
        for space in {space for space, _ in self._iotlb.entries}:
            self._iotlb.invalidate(0, _EVERYTHING_BYTES, address_space=space)

    def close(self) -> None:
        """Unmap from this process. The device must be closed, or have forgotten everything. Idempotent."""
        for mapping in (*(mapping for mapping, _ in self._mappings.values()), *self._leaving):
            mapping.close()
        self._mappings, self._leaving = {}, []

    def abandon(self) -> None:
        """Leave everything mapped in this process, for as long as it lives: a call still in the kernel may be pinning
        what is at these addresses, where other memory could otherwise appear."""
        self._mappings, self._leaving = {}, []

    def _batch_of(self, space: int, count: int) -> contextlib.AbstractContextManager[None]:
        """A batch if there is more than one change, so that the device applies all of them at once (mlx5 makes its
        whole memory key again each time). A single change is no more work without a batch, and the kernel reports its
        failure, but not that of a batch."""
        return self._iotlb.batch(space) if count > 1 else contextlib.nullcontext()

    def _map_one(self, region: MemoryRegion) -> None:
        what = f"map {region.size_bytes} bytes at {region.guest_address:#x}"
        try:
            check_inside(region.fd, region.size_bytes, region.offset)
        except OSError as error:
            raise MappingError(what, device=self._device, why=str(error.strerror)) from None
        if fcntl.fcntl(region.fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            # also for a region that the device may only read: to the kernel, a shared mapping of a read-only descriptor
            # is not shared memory
            raise MappingError(what, device=self._device, why="its descriptor is not open for reading and writing")
        mapping = SharedMapping(region.fd, region.size_bytes, region.offset)
        try:
            where = (region.guest_address, region.size_bytes, mapping.address)
            self._iotlb.update(*where, writable=region.writable, address_space=region.address_space, known_shared=True)
        except (KernelError, MappingError):
            mapping.close()
            raise
        except BaseException:
            self._leaving.append(mapping)
            raise
        self._mappings[_key(region)] = (mapping, region.writable)


def _key(region: MemoryRegion) -> tuple[int, int]:
    return region.address_space, region.guest_address


def _by_space(regions: Sequence[MemoryRegion]) -> Iterator[tuple[int, list[MemoryRegion]]]:
    for space in sorted({region.address_space for region in regions}):
        yield space, [region for region in regions if region.address_space == space]
