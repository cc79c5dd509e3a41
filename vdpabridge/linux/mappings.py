"""Memory that is shared: files in memory, mappings of files, and what makes access to them safe.

A device behind vhost-vdpa needs memory that is shared and has a file behind it; ordinary Python memory has neither.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import sys
from functools import cache
from typing import Any, Self

__all__ = ["SharedMapping", "atomic_set_bits", "check_inside", "memory_file", "store_barrier"]


@cache
def _libc() -> tuple[Any, Any]:
    from ._libc import ffi  # imported here, because most commands need no memory

    return ffi, ffi.dlopen(None)


#: The largest number that mmap(2) takes for a size or an offset.
_OFFSET_MAX = (1 << 63) - 1


def check_inside(fd: int, size_bytes: int, offset: int) -> None:
    """Raise OSError (EINVAL) unless ``size_bytes`` from ``offset`` lie in file ``fd`` (borrowed).

    A description of memory from another process has to pass here first: a process that touches a mapping beyond the end
    of its file is killed (SIGBUS). Only a regular file has an end that can be checked.
    """
    status = os.fstat(fd)
    if size_bytes <= 0 or offset < 0 or offset + size_bytes > _OFFSET_MAX:
        raise OSError(errno.EINVAL, f"{size_bytes} bytes at {offset} are not part of any file")
    if stat.S_ISREG(status.st_mode) and offset + size_bytes > status.st_size:
        raise OSError(errno.EINVAL, f"{size_bytes} bytes at {offset} of a file of {status.st_size} bytes")


def memory_file(name: str, size_bytes: int, *, sealed: bool = False) -> int:
    """A memfd of ``size_bytes``, owned by the caller; ``sealed``: no process can change its size any more."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealed else 0))
    try:
        os.ftruncate(fd, size_bytes)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd


#: include/uapi/asm-generic/mman-common.h
_MADV_DONTDUMP = 16


class SharedMapping:
    """``size_bytes`` of file ``fd`` from ``offset``, mapped shared. ``fd`` is borrowed; the mapping outlives it.

    This process's core dumps leave it out: it holds the guest's secrets, and is as large as the guest's memory.
    `address` is where it lies in this process; `view` reads and writes it. Raises OSError as mmap(2) does. Do not use
    `view`, or a slice of it, after `close`.
    """

    def __init__(
        self, fd: int, size_bytes: int, offset: int = 0, *, protection: int = mmap.PROT_READ | mmap.PROT_WRITE
    ) -> None:
        ffi, libc = _libc()
        pointer = libc.mmap(ffi.NULL, size_bytes, protection, mmap.MAP_SHARED, fd, offset)
        if int(ffi.cast("intptr_t", pointer)) == -1:
            raise OSError(ffi.errno, f"mmap of {size_bytes} bytes at {offset}: {os.strerror(ffi.errno)}")
        libc.madvise(pointer, size_bytes, _MADV_DONTDUMP)
        self.size_bytes = size_bytes
        self.address = int(ffi.cast("uintptr_t", pointer))
        self.view = memoryview(ffi.buffer(pointer, size_bytes))
        self._pointer = pointer

    def close(self) -> None:
        """Unmap. Idempotent."""
        if self._pointer is not None:
            self.view.release()
            _, libc = _libc()
            libc.munmap(self._pointer, self.size_bytes)
            self._pointer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "closed" if self._pointer is None else f"at {self.address:#x}"
        return f"<SharedMapping {where}: {self.size_bytes} bytes>"


_MEMBARRIER_GLOBAL_EXPEDITED = 2
#: System call number of membarrier(2) on machines that reorder stores; x86 does not and needs nothing.
_MEMBARRIER_NUMBER = {"aarch64": 283, "riscv64": 283, "loongarch64": 283, "s390x": 356, "ppc64le": 365}.get(
    os.uname().machine
)


def store_barrier() -> None:
    """Let no later store or load of this thread overtake an earlier one, as seen by a device (VIRTIO 1.4, 2.7.13)."""
    if _MEMBARRIER_NUMBER is not None:
        ffi, libc = _libc()
        libc.syscall(_MEMBARRIER_NUMBER, ffi.cast("int", _MEMBARRIER_GLOBAL_EXPEDITED), ffi.cast("int", 0))


_FUTEX_WAKE_OP = 5
#: FUTEX_OP_OR of ``1 << argument``, compared with 0 for equality: the result of that wakes nobody.
_FUTEX_OR_SHIFTED = (8 | 2) << 28
#: The same of an argument of 12 bits with a sign: -1, all bits of the word.
_FUTEX_OR_ALL = 2 << 28 | 0xFFF << 12
#: System call number of futex(2).
_FUTEX_NUMBER = {"x86_64": 202, "s390x": 238, "ppc64le": 221}.get(os.uname().machine, 98)


def atomic_set_bits(mapping: SharedMapping, first: int, count: int = 1) -> None:
    """Set ``count`` bits of ``mapping``, little-endian within bytes, atomically also for other processes.

    The kernel does it (futex(2), FUTEX_WAKE_OP), a word of 32 at a time: Python can only read and then write, and would
    lose a bit that another process sets in between. If a page is gone because the file was cut, this raises OSError;
    Python's own write would end the process. The mapping's start is aligned to 4 bytes and its size a multiple of them.
    """
    end = first + count
    while first < end:
        word, bit = divmod(first, 32)
        if not bit and end - first >= 32:
            _or_word(mapping, word, _FUTEX_OR_ALL)
            first += 32
        else:
            _or_word(mapping, word, _FUTEX_OR_SHIFTED | (bit ^ 24 if sys.byteorder == "big" else bit) << 12)
            first += 1


def _or_word(mapping: SharedMapping, word: int, operation: int) -> None:
    ffi, libc = _libc()
    address = ffi.cast("void *", mapping.address + 4 * word)
    zero, encoded = ffi.cast("int", 0), ffi.cast("int", operation)
    if libc.syscall(_FUTEX_NUMBER, address, ffi.cast("int", _FUTEX_WAKE_OP), zero, ffi.NULL, address, encoded) < 0:
        raise OSError(ffi.errno, f"setting bits at {4 * word}: {os.strerror(ffi.errno)}")
