"""Guest memory: a memfd that this process, the device and (elsewhere) a guest all map."""

from __future__ import annotations

import os
from typing import Self

from ..device import MemoryRegion
from ..linux.mappings import SharedMapping, memory_file

__all__ = ["GuestMemory"]


class GuestMemory:
    """Memory for a guest driver in this process: one region at ``guest_address``, allocated from its start.

    Owns its memfd. All addresses are the guest's.
    """

    def __init__(self, size_bytes: int, guest_address: int = 0x1000_0000) -> None:
        self._fd = memory_file("vdpabridge-guest", size_bytes)
        self._mapping = SharedMapping(self._fd, size_bytes)
        self.guest_address = guest_address
        self.size_bytes = size_bytes
        self.view = self._mapping.view
        self._next = 0

    @property
    def region(self) -> MemoryRegion:
        """All of it, to be mapped into a device."""
        return MemoryRegion(self.guest_address, self.size_bytes, self._fd)

    @property
    def mapping(self) -> SharedMapping:
        """The memory as this process sees it; borrowed."""
        return self._mapping

    def allocate(self, size_bytes: int, align_bytes: int = 64) -> int:
        """The guest address of ``size_bytes`` fresh zero bytes. Raises MemoryError if not enough is left."""
        start = -(-self._next // align_bytes) * align_bytes
        if start + size_bytes > self.size_bytes:
            raise MemoryError(f"guest memory of {self.size_bytes} bytes is full: {size_bytes} more do not fit")
        self._next = start + size_bytes
        return self.guest_address + start

    def slice(self, guest_address: int, size_bytes: int) -> memoryview:
        """A writable view of ``size_bytes`` at ``guest_address``. Raises ValueError outside of the memory."""
        start = guest_address - self.guest_address
        if start < 0 or start + size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes at {guest_address:#x} are not in {self!r}")
        return self.view[start : start + size_bytes]

    def fileno(self) -> int:
        """The memfd; borrowed."""
        return self._fd

    def close(self) -> None:
        """Unmap and close. Idempotent. A device that has the memory mapped keeps it alive."""
        if self._fd >= 0:
            self._mapping.close()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GuestMemory {self.guest_address:#x}: {self.size_bytes} bytes>"
