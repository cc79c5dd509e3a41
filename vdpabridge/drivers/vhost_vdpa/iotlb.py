"""The IOTLB of a vhost-vdpa device: which memory it sees, at which IOVA, in which address space.

Every refusal of an IOTLB message is EFAULT, whatever the cause, and memory of the wrong kind is accepted and then not
mapped at all. So the preconditions are checked here, before the kernel is asked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator

from ...abi.vhost import (
    VHOST_ACCESS_RO,
    VHOST_ACCESS_RW,
    VHOST_BACKEND_F_IOTLB_ASID,
    VHOST_BACKEND_F_IOTLB_BATCH,
    VHOST_IOTLB_BATCH_BEGIN,
    VHOST_IOTLB_BATCH_END,
    VHOST_IOTLB_INVALIDATE,
    VHOST_IOTLB_MSG_V2,
    VHOST_IOTLB_UPDATE,
    VHOST_MSG_V2_LAYOUT,
)
from ...errors import DeadlineExceeded, KernelError, OwnershipError, VdpaBridgeError
from .node import Node

__all__ = ["Iotlb", "MappingError"]

#: vhost_vdpa.max_iotlb_entries, unless the module was loaded with another value.
DEFAULT_ENTRIES_MAX = 2048


class MappingError(VdpaBridgeError):
    """Memory that cannot be mapped into the device; the kernel was not asked."""


class Iotlb:
    """The IOTLB behind an open `Node` (borrowed). ``backend_features`` are the accepted ones."""

    def __init__(
        self, node: Node, iova_range: tuple[int, int], address_space_count: int, backend_features: int
    ) -> None:
        self._node = node
        self.iova_range = iova_range
        self.address_space_count = address_space_count
        self._can_batch = bool(backend_features >> VHOST_BACKEND_F_IOTLB_BATCH & 1)
        self._has_asid = bool(backend_features >> VHOST_BACKEND_F_IOTLB_ASID & 1)
        self.entries: dict[tuple[int, int], int] = {}
        """(address space, IOVA) -> size in bytes, of what is mapped."""

    def update(
        self,
        iova: int,
        size_bytes: int,
        address: int,
        *,
        writable: bool = True,
        address_space: int = 0,
        known_shared: bool = False,
    ) -> None:
        """Map ``size_bytes`` at ``address`` of this process to ``iova``.

        ``known_shared`` saves looking whether the memory is of the kind that can be mapped. Raises `MappingError` where
        it is seen beforehand that the kernel would refuse, or would accept and map nothing; `KernelError` (EFAULT) with
        the causes that are left where the kernel refuses.
        """
        self._check(iova, size_bytes, address, address_space)
        if not known_shared and (private := _private_part(address, size_bytes)) is not None:
            why = f"{private:#x} is private, read-only or unmapped memory"
            self._refuse(iova, size_bytes, f"{why}: only shared, writable memory of a file can be mapped (memfd)")
        perm = VHOST_ACCESS_RW if writable else VHOST_ACCESS_RO
        self._send(VHOST_IOTLB_UPDATE, address_space, iova=iova, size=size_bytes, address=address, perm=perm)
        self.entries[address_space, iova] = size_bytes

    def invalidate(self, iova: int, size_bytes: int, *, address_space: int = 0) -> None:
        """Take every entry away that overlaps the range; the kernel never splits one."""
        end = iova + size_bytes
        gone = [
            key
            for key, size in self.entries.items()
            if key[0] == address_space and key[1] < end and iova < key[1] + size
        ]
        if not gone:
            return  # an address space that nothing was ever mapped in answers EFAULT
        self._send(VHOST_IOTLB_INVALIDATE, address_space, iova=iova, size=size_bytes)
        for key in gone:
            del self.entries[key]

    @contextlib.contextmanager
    def batch(self, address_space: int = 0) -> Iterator[None]:
        """Let the device see the changes made inside at once, where it can. They must be to ``address_space``.

        The kernel ignores a failure of the device to take the batch in; there is no way to learn of it.
        """
        self._check_space(address_space)
        if not self._can_batch:
            yield
            return
        self._send(VHOST_IOTLB_BATCH_BEGIN, address_space)
        try:
            yield
        except BaseException:
            # what went wrong inside is what the caller must hear of
            with contextlib.suppress(KernelError, DeadlineExceeded, OwnershipError):
                self._send(VHOST_IOTLB_BATCH_END, address_space)
            raise
        self._send(VHOST_IOTLB_BATCH_END, address_space)

    def _send(
        self, kind: int, address_space: int, *, iova: int = 0, size: int = 0, address: int = 0, perm: int = 0
    ) -> None:
        message = VHOST_MSG_V2_LAYOUT.pack(VHOST_IOTLB_MSG_V2, address_space, iova, size, address, perm, kind)
        try:
            self._node.write(message)
        except DeadlineExceeded:
            raise
        except OSError as error:
            raise self._explain(error, iova, size, address_space) from None

    def _check(self, iova: int, size: int, address: int, address_space: int) -> None:
        first, last = self.iova_range
        page = resource.getpagesize()
        self._check_space(address_space)
        if size <= 0 or iova < first or iova + size - 1 > last:
            self._refuse(iova, size, f"outside the device's IOVA range {first:#x} to {last:#x}")
        if iova % page != address % page:
            # the kernel rounds the IOVA down to its page but not the address: data would land shifted
            self._refuse(iova, size, f"IOVA and memory differ in their offset within a page of {page} bytes")
        for (space, start), length in self.entries.items():
            if space == address_space and start < iova + size and iova < start + length:
                self._refuse(iova, size, f"overlaps what is mapped at {start:#x}, {length} bytes: unmap that first")

    def _check_space(self, address_space: int) -> None:
        # a device with one space, or that was not told to heed the field, would take it for space 0
        if not 0 <= address_space < (self.address_space_count if self._has_asid else 1):
            why = f"no address space {address_space}: the device has {self.address_space_count}, numbered from 0"
            raise MappingError("map memory", device=self._node.path, why=why)

    def _refuse(self, iova: int, size: int, why: str) -> None:
        raise MappingError(f"map {size} bytes at {iova:#x}", device=self._node.path, why=why)

    def _explain(self, error: OSError, iova: int, size: int, address_space: int) -> KernelError:
        code = error.errno or 0
        what = f"IOTLB message for {size} bytes at {iova:#x}"
        if code != errno.EFAULT:
            return KernelError(code, what, device=self._node.path)
        causes = []
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if limit != resource.RLIM_INFINITY and size + _pinned_bytes() > limit:
            # no exemption for root: CAP_IPC_LOCK does not help (vhost_vdpa_pa_map)
            needed = size + _pinned_bytes()
            causes.append(f"locked memory, where pages are pinned: {needed} bytes needed, limit {limit} ('ulimit -l')")
        count = sum(1 for space, _ in self.entries if space == address_space)
        causes += [
            f"too many entries: {count} now, vhost_vdpa.max_iotlb_entries is {DEFAULT_ENTRIES_MAX} by default, and "
            "pinned memory counts once for each piece",
            "the owner's memory was replaced by execve",
            "the device refused it",
        ]
        why = "it can be: " + "; ".join(causes)
        return KernelError(code, what, device=self._node.path, why=why, hint="the kernel log may say more")


def _private_part(address: int, size: int) -> int | None:
    """The first address of the range that is not in a shared, writable mapping of a file; None where all of it is.

    A mapping of a file that was opened for reading only shows as shared and is not (mm/mmap.c clears VM_SHARED): the
    kernel would skip it like private memory. Writable ones cannot be of that kind.
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


def _pinned_bytes() -> int:
    with open(f"/proc/{os.getpid()}/status", encoding="ascii", errors="replace") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmPin:")), 0)
