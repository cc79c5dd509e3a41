"""Guest memory as a device sees it: guest addresses to bytes, and a note of every page that it writes."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from ..device.values import DirtyLog, MemoryRegion
from ..linux.mappings import SharedMapping, atomic_set_bits, check_inside

__all__ = ["BadAddress", "DirtyBitmap", "GuestView"]

#: The log's page size, whatever the machine's page size is.
_LOG_PAGE_BYTES = 4096


class BadAddress(Exception):
    """A guest address that no region has, or that may not be written: the guest's driver broke the rules."""


class DirtyBitmap:
    """A dirty log, mapped. ``log.fd`` is borrowed. Other processes set and clear bits of it at the same time."""

    def __init__(self, log: DirtyLog) -> None:
        check_inside(log.fd, log.size_bytes, log.offset)
        skipped = log.offset % mmap.ALLOCATIONGRANULARITY
        self._first_bit = 8 * skipped
        self._bits = 8 * log.size_bytes
        self._mapping = SharedMapping(log.fd, log.size_bytes + skipped, log.offset - skipped)

    def mark(self, guest_address: int, size_bytes: int) -> None:
        """Note the pages from ``guest_address`` on, after the write: otherwise a process may copy them too early."""
        first, last = guest_address // _LOG_PAGE_BYTES, (guest_address + size_bytes - 1) // _LOG_PAGE_BYTES
        if last >= self._bits:
            raise BadAddress(f"page {last:#x} is beyond the dirty log's {self._bits:#x}")
        atomic_set_bits(self._mapping, self._first_bit + first, last + 1 - first)

    def mark_all(self, regions: Iterable[MemoryRegion]) -> None:
        """Note every page of ``regions`` that a device can have written, as far as the log reaches."""
        for region in regions:
            end = min(region.guest_address + region.size_bytes, self._bits * _LOG_PAGE_BYTES)
            if region.writable and end > region.guest_address:
                self.mark(region.guest_address, end - region.guest_address)

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._mapping.close()


class _Mapped:
    """A region and where this process sees it. The file is mapped from a multiple of its own page size on.

    If the file is made shorter later, the kernel kills a process that touches what was its end; nothing can be done
    about that here.
    """

    def __init__(self, region: MemoryRegion) -> None:
        self.region = region
        check_inside(region.fd, region.size_bytes, region.offset)
        # for hugetlbfs this is the size of its pages
        granule_bytes = max(mmap.ALLOCATIONGRANULARITY, os.fstat(region.fd).st_blksize)
        skipped = region.offset % granule_bytes
        size = -(-(region.size_bytes + skipped) // granule_bytes) * granule_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if region.writable else 0)
        self._mapping = SharedMapping(region.fd, size, region.offset - skipped, protection=protection)
        self.view = self._mapping.view[skipped : skipped + region.size_bytes]

    def close(self) -> None:
        self.view.release()
        self._mapping.close()


class GuestView:
    """The mapped regions, and the dirty log if there is one. Do not change it while a ring is processed."""

    def __init__(self) -> None:
        self._mapped: list[_Mapped] = []
        self._starts: list[int] = []
        self._log: DirtyBitmap | None = None
        self.generation = 0
        """Changes with every change of the mappings: a view from before may be of memory that is gone."""

    def map(self, regions: Sequence[MemoryRegion]) -> None:
        """Add ``regions``, all or none. Their fds are borrowed. Raises OSError as mmap(2) does."""
        added: list[_Mapped] = []
        try:
            for region in regions:
                added.append(_Mapped(region))
        except BaseException:
            for each in added:
                each.close()
            raise
        self._set([*self._mapped, *added])

    def unmap(self, regions: Sequence[MemoryRegion]) -> None:
        """Unmap ``regions``, which are mapped."""
        gone = {region.guest_address for region in regions}
        for each in self._mapped:
            if each.region.guest_address in gone:
                each.close()
        self._set([each for each in self._mapped if each.region.guest_address not in gone])

    def set_log(self, log: DirtyLog | None) -> None:
        """Note written pages in ``log`` from now on."""
        bitmap = None if log is None else DirtyBitmap(log)
        if self._log is not None:
            self._log.close()
        self._log = bitmap

    def slice(self, guest_address: int, size_bytes: int, *, write: bool = False) -> memoryview:
        """The bytes at ``guest_address``, which lie in one region. Raises `BadAddress`. Release it before `unmap`."""
        at = bisect_right(self._starts, guest_address) - 1
        if at >= 0:
            mapped = self._mapped[at]
            start = guest_address - mapped.region.guest_address
            if start + size_bytes <= mapped.region.size_bytes and (mapped.region.writable or not write):
                return mapped.view[start : start + size_bytes]
        raise BadAddress(f"{size_bytes} bytes at {guest_address:#x} are not mapped{' for writing' if write else ''}")

    def pieces(self, guest_address: int, size_bytes: int, *, write: bool = False) -> Iterator[memoryview]:
        """Like `slice`, for bytes that may continue in the next region."""
        while size_bytes:
            at = bisect_right(self._starts, guest_address) - 1
            end = self._mapped[at].region.guest_address + self._mapped[at].region.size_bytes if at >= 0 else 0
            here = min(size_bytes, max(end - guest_address, 1))
            yield self.slice(guest_address, here, write=write)
            guest_address, size_bytes = guest_address + here, size_bytes - here

    def written(self, guest_address: int, size_bytes: int) -> None:
        """Note that the device wrote there."""
        if self._log is not None and size_bytes:
            self._log.mark(guest_address, size_bytes)

    def close(self) -> None:
        """Unmap everything. Idempotent."""
        self.set_log(None)
        for each in self._mapped:
            each.close()
        self._set([])

    def _set(self, mapped: list[_Mapped]) -> None:
        self._mapped = sorted(mapped, key=lambda each: each.region.guest_address)
        self._starts = [each.region.guest_address for each in self._mapped]
        self.generation += 1
