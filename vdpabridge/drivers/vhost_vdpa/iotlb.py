"""The IOTLB of a vhost-vdpa device: which memory it sees, at which IOVA, in which address space.

The kernel refuses every IOTLB message with EFAULT, whatever the cause. It accepts memory of the wrong kind, and then
does not map it at all. So this module checks the preconditions before it asks the kernel. `Device.map` has checked
those of every device: overlaps, and the address space, which the kernel treats as 0 unless IOTLB_ASID was accepted.
"""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterable, Iterator

from ...abi.vhost import (
    VHOST_ACCESS_RO,
    VHOST_ACCESS_RW,
    VHOST_BACKEND_F_IOTLB_BATCH,
    VHOST_IOTLB_BATCH_BEGIN,
    VHOST_IOTLB_BATCH_END,
    VHOST_IOTLB_INVALIDATE,
    VHOST_IOTLB_MSG_V2,
    VHOST_IOTLB_UPDATE,
    VHOST_MSG_V2_LAYOUT,
)
from ...errors import DeadlineExceeded, KernelError, OwnershipError, VdpaBridgeError, errno_name
from .memory_rules import causes_of_refusal, private_part
from .node import Node

__all__ = ["Iotlb", "IotlbBroken", "MappingError"]


class MappingError(VdpaBridgeError):
    """Memory that cannot be mapped into the device; the kernel was not asked."""


class IotlbBroken(VdpaBridgeError):
    """It is not known what is mapped, and the kernel refuses to unmap it. Only closing the device helps."""

    def __init__(self, device: str, cause: KernelError) -> None:
        why = f"it is not known what is mapped, and the kernel refuses to unmap it: {errno_name(cause.errno or 0)}"
        super().__init__("repair the IOTLB", device=device, why=why, hint="close the device: that unmaps everything")


class Iotlb:
    """The IOTLB behind an open `Node` (borrowed). ``backend_features`` are the accepted ones."""

    def __init__(self, node: Node, iova_range: tuple[int, int], backend_features: int) -> None:
        self._node = node
        self.iova_range = iova_range
        self._can_batch = bool(backend_features >> VHOST_BACKEND_F_IOTLB_BATCH & 1)
        self.entries: dict[tuple[int, int], int] = {}
        """(address space, IOVA) -> size in bytes, of what is mapped."""
        self.doubtful: dict[tuple[int, int], int] = {}
        """Entries that may be mapped or not: the answer to a message about them has not come."""
        self._begun: int | None = None
        """The address space of a batch that the kernel may have begun and not ended."""
        self._inside = False
        """Whether the body of that batch is running."""

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

        ``known_shared`` skips the check whether the memory is of a kind that can be mapped. Raises `MappingError` if a
        check shows that the kernel would refuse, or would accept and map nothing; `KernelError` (EFAULT), with the
        causes that are left, if the kernel refuses. After any other error the entry is `doubtful`.
        """
        self.repair()
        self._check(iova, size_bytes, address)
        if not known_shared and (private := private_part(address, size_bytes)) is not None:
            why = f"{private:#x} is private, read-only or unmapped memory"
            self._refuse(iova, size_bytes, f"{why}: only shared, writable memory of a file can be mapped (memfd)")
        perm = VHOST_ACCESS_RW if writable else VHOST_ACCESS_RO
        key = address_space, iova
        self.doubtful[key] = size_bytes
        try:
            self._send(VHOST_IOTLB_UPDATE, address_space, iova=iova, size=size_bytes, address=address, perm=perm)
        except KernelError:
            # the kernel maps all of it or nothing (vhost_vdpa_process_iotlb_update)
            del self.doubtful[key]
            raise
        self.entries[key] = self.doubtful.pop(key)

    def invalidate(self, iova: int, size_bytes: int, *, address_space: int = 0) -> None:
        """Unmap every entry that overlaps the range; the kernel never splits one."""
        self.repair()
        end = iova + size_bytes
        gone = {
            key: size
            for key, size in self.entries.items()
            if key[0] == address_space and key[1] < end and iova < key[1] + size
        }
        if not gone:
            return  # in an address space that was never used, the kernel answers EFAULT
        self.doubt(gone)
        try:
            self._send(VHOST_IOTLB_INVALIDATE, address_space, iova=iova, size=size_bytes)
        except KernelError:
            self._forget(gone)
            self.entries |= gone
            raise
        self._forget(gone)

    @contextlib.contextmanager
    def batch(self, address_space: int = 0) -> Iterator[None]:
        """Let the device see the changes made inside at once, if it can. They must be to ``address_space``.

        If the device fails to apply the batch, the kernel ignores that (vhost_vdpa_process_iotlb_msg, BATCH_END). Only
        the status of the started device may show it.
        """
        self.repair()
        if not self._can_batch:
            yield
            return
        self._begun = address_space
        try:
            self._send(VHOST_IOTLB_BATCH_BEGIN, address_space)
        except KernelError:
            self._begun = None
            raise
        self._inside = True
        try:
            yield
        except BaseException:
            # the caller must get the error from inside; `repair` does what is left to be done
            with contextlib.suppress(KernelError, DeadlineExceeded, OwnershipError):
                self._end_batch(address_space)
            raise
        finally:
            self._inside = False
        self._end_batch(address_space)

    def doubt(self, keys: Iterable[tuple[int, int]]) -> None:
        """Count entries ``keys`` as `doubtful`: `repair` unmaps them."""
        for key in list(keys):
            if key in self.entries:
                self.doubtful[key] = self.entries.pop(key)

    def repair(self) -> None:
        """Make the kernel and these records agree again, after a message whose answer has not come.

        A batch that was not ended would keep every later change from the device, which would continue to use pages that
        are not pinned any more. Does nothing if nothing is in doubt, or in the middle of a batch. Raises `IotlbBroken`
        if the kernel refuses, `DeadlineExceeded` if it does not answer: until this succeeds, the kernel is asked
        nothing else.
        """
        if self._inside:
            return
        if self._begun is not None:
            self._send_to_repair(VHOST_IOTLB_BATCH_END, self._begun)
            self._begun = None
        for (space, iova), size in list(self.doubtful.items()):
            self._send_to_repair(VHOST_IOTLB_INVALIDATE, space, iova=iova, size=size)
            del self.doubtful[space, iova]

    @property
    def in_doubt(self) -> bool:
        """Whether there is something to `repair`."""
        return self._begun is not None or bool(self.doubtful)

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

    def _send_to_repair(self, kind: int, address_space: int, *, iova: int = 0, size: int = 0) -> None:
        try:
            self._send(kind, address_space, iova=iova, size=size)
        except KernelError as error:
            # EFAULT, if nothing is mapped: the address space was never used, so the message in doubt did not arrive
            if error.errno != errno.EFAULT or any(space == address_space for space, _ in self.entries):
                raise IotlbBroken(self._node.path, error) from error

    def _forget(self, keys: Iterable[tuple[int, int]]) -> None:
        for key in keys:
            self.doubtful.pop(key, None)

    def _end_batch(self, address_space: int) -> None:
        self._send(VHOST_IOTLB_BATCH_END, address_space)
        self._begun = None

    def _check(self, iova: int, size: int, address: int) -> None:
        first, last = self.iova_range
        page = resource.getpagesize()
        if size <= 0 or iova < first or iova + size - 1 > last:
            self._refuse(iova, size, f"outside the device's IOVA range {first:#x} to {last:#x}")
        if iova % page != address % page:
            # the kernel rounds the IOVA down to its page but not the address: data would land shifted
            self._refuse(iova, size, f"IOVA and memory differ in their offset within a page of {page} bytes")

    def _refuse(self, iova: int, size: int, why: str) -> None:
        raise MappingError(f"map {size} bytes at {iova:#x}", device=self._node.path, why=why)

    def _explain(self, error: OSError, iova: int, size: int, address_space: int) -> KernelError:
        code = error.errno or 0
        what = f"IOTLB message for {size} bytes at {iova:#x}"
        if code != errno.EFAULT:
            return KernelError(code, what, device=self._node.path)
        count = sum(1 for space, _ in self.entries if space == address_space)
        why = "it can be: " + "; ".join(causes_of_refusal(size, count))
        return KernelError(code, what, device=self._node.path, why=why, hint="the kernel log may say more")
