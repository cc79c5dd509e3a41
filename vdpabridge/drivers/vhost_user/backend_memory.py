"""Guest memory in a back-end: the whole table each time, or region by region if the back-end has memory slots."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ...abi.vhost_user import MEMORY_REGIONS_MAX, FrontendRequest, ProtocolFeature
from ...abi.vhost_user_payloads import MemoryTable, Region, SingleRegion
from ...device.values import MemoryRegion
from ...errors import DeadlineExceeded, PeerRefused, ProtocolError
from .backend_requests import BackendRequests

__all__ = ["BackendMemory"]


class BackendMemory:
    """The memory that the back-end sees. The "user address" of a region, only a key, is its guest address."""

    def __init__(self, requests: BackendRequests, slots: int) -> None:
        """``slots``: how many memory slots the back-end says it has; 0 if it takes tables only."""
        self._requests = requests
        self._slots = slots
        self._mapped: dict[Region, int] = {}
        """Each region with its descriptor, borrowed from the device: tables send all of them each time."""
        self._doubtful: list[Region] = []
        """Regions that the back-end may have or not: the answer to a message about them has not come."""
        self._table_in_doubt = False

    def map(self, regions: Sequence[MemoryRegion]) -> None:
        """Add ``regions``, all or none. Raises ValueError if they are too many."""
        limit = self._slots or MEMORY_REGIONS_MAX
        if len(self._mapped) + len(regions) > limit:
            raise ValueError(f"{self._requests.peer}: the back-end takes {limit} memory regions at most")
        self.settle()
        if self._slots:
            self._add(regions)
            return
        self._send_table(wanted := self._mapped | {_region(each): each.fd for each in regions})
        self._mapped = wanted

    def unmap(self, regions: Sequence[MemoryRegion]) -> None:
        """Unmap ``regions``, which are mapped. If this raises, some may be gone: see `has`."""
        self.settle()
        gone = [_region(each) for each in regions]
        if self._slots:
            for region in gone:
                self._remove(region)
            return
        before = self._mapped
        self._mapped = {region: fd for region, fd in before.items() if region not in gone}
        try:
            self._send_table(self._mapped)
        except PeerRefused:
            self._mapped = before
            raise

    def has(self, region: MemoryRegion) -> bool:
        """Whether ``region`` counts as mapped."""
        return _region(region) in self._mapped

    def settle(self) -> None:
        """Make the back-end and these records agree, after a message whose answer has not come."""
        while self._doubtful:
            # if it refuses, it does not have the region
            with contextlib.suppress(PeerRefused):
                self._requests.tell(FrontendRequest.REM_MEM_REG, SingleRegion(self._doubtful[-1]))
            self._doubtful.pop()
        if self._table_in_doubt:
            self._send_table(self._mapped)

    def _add(self, regions: Sequence[MemoryRegion]) -> None:
        added: list[Region] = []
        try:
            for each in regions:
                region = _region(each)
                self._doubtful.append(region)
                try:
                    self._requests.tell(FrontendRequest.ADD_MEM_REG, SingleRegion(region), [each.fd])
                except PeerRefused:
                    self._doubtful.remove(region)
                    raise
                self._mapped[region] = each.fd
                self._doubtful.remove(region)
                added.append(region)
        except BaseException:
            self._doubtful += added
            for region in added:
                del self._mapped[region]
            with contextlib.suppress(ProtocolError, DeadlineExceeded):
                self.settle()
            raise

    def _remove(self, region: Region) -> None:
        fd = self._mapped[region]
        self._doubtful.append(region)
        del self._mapped[region]
        try:
            self._requests.tell(FrontendRequest.REM_MEM_REG, SingleRegion(region))
        except PeerRefused:
            self._mapped[region] = fd
            self._doubtful.remove(region)
            raise
        self._doubtful.remove(region)

    def _send_table(self, wanted: dict[Region, int]) -> None:
        # some back-ends (rust-vmm) refuse an empty table: they keep the last region, and no queue runs
        if not wanted:
            return
        self._table_in_doubt = True
        try:
            self._requests.tell(FrontendRequest.SET_MEM_TABLE, MemoryTable(tuple(wanted)), list(wanted.values()))
        except PeerRefused:
            self._table_in_doubt = False
            raise
        self._table_in_doubt = False


def _region(region: MemoryRegion) -> Region:
    return Region(region.guest_address, region.size_bytes, region.guest_address, region.offset)


def slots_of(requests: BackendRequests) -> int:
    """How many memory slots the back-end has; 0 if it has none, or offers them without having implemented them."""
    if not requests.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
        return 0
    return requests.ask_u64(FrontendRequest.GET_MAX_MEM_SLOTS)
