"""Guest memory in a back-end: the whole table anew, or region by region where the back-end has memory slots."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ...abi.vhost_user import MEMORY_REGIONS_MAX, FrontendRequest, ProtocolFeature
from ...abi.vhost_user_payloads import MemoryTable, Region, SingleRegion
from ...device.values import MemoryRegion
from ...errors import ProtocolError
from .backend_requests import BackendRequests

__all__ = ["BackendMemory"]


class BackendMemory:
    """What the back-end sees. The "user address" of a region, a mere key to the back-end, is its guest address."""

    def __init__(self, requests: BackendRequests, slots: int) -> None:
        """``slots``: what the back-end says that it has; 0 where it takes tables only."""
        self._requests = requests
        self._slots = slots
        self._mapped: dict[Region, int] = {}
        """Each region with its descriptor, borrowed from the device: tables send all of them each time."""

    def map(self, regions: Sequence[MemoryRegion]) -> None:
        """Add ``regions``, all or none. Raises ValueError if they are too many."""
        limit = self._slots or MEMORY_REGIONS_MAX
        if len(self._mapped) + len(regions) > limit:
            raise ValueError(f"{self._requests.peer}: the back-end takes {limit} memory regions at the most")
        if self._slots:
            self._add(regions)
        else:
            self._replace(self._mapped | {_region(each): each.fd for each in regions})

    def unmap(self, regions: Sequence[MemoryRegion]) -> None:
        """Take ``regions``, which are mapped, away."""
        gone = [_region(each) for each in regions]
        kept = {region: fd for region, fd in self._mapped.items() if region not in gone}
        if not self._slots:
            self._replace(kept)
            return
        for region in gone:
            self._requests.tell(FrontendRequest.REM_MEM_REG, SingleRegion(region))
        self._mapped = kept

    def _add(self, regions: Sequence[MemoryRegion]) -> None:
        added: dict[Region, int] = {}
        try:
            for each in regions:
                region = _region(each)
                self._requests.tell(FrontendRequest.ADD_MEM_REG, SingleRegion(region), [each.fd])
                added[region] = each.fd
        except BaseException:
            with contextlib.suppress(ProtocolError):
                for region in added:
                    self._requests.tell(FrontendRequest.REM_MEM_REG, SingleRegion(region))
            raise
        self._mapped |= added

    def _replace(self, wanted: dict[Region, int]) -> None:
        # an empty table is an error to some back-ends (rust-vmm): they keep the last region, and nothing runs
        if wanted:
            table = MemoryTable(tuple(wanted))
            self._requests.tell(FrontendRequest.SET_MEM_TABLE, table, list(wanted.values()))
        self._mapped = wanted


def _region(region: MemoryRegion) -> Region:
    return Region(region.guest_address, region.size_bytes, region.guest_address, region.offset)


def slots_of(requests: BackendRequests) -> int:
    """How many memory slots the back-end has; 0 for none, or for one that offers them and has not written them."""
    if not requests.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
        return 0
    return requests.ask_u64(FrontendRequest.GET_MAX_MEM_SLOTS)
