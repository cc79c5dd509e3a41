"""Writes ``_libc.py``: ``python3 -m vdpabridge.linux._libc_build``.

cffi's out-of-line ABI mode needs no compiler and no parser at run time: importing the result costs about a
millisecond. It gives access to what the standard library hides: the address of a mapping, a memory barrier,
asynchronous I/O (``struct iocb``: include/uapi/linux/aio_abi.h).
"""

from pathlib import Path

import cffi

__all__ = ["write"]

DECLARATIONS = """
void *mmap(void *address, size_t length, int protection, int flags, int fd, int64_t offset);
int munmap(void *address, size_t length);
int madvise(void *address, size_t length, int advice);
long syscall(long number, ...);
struct iocb {
    uint64_t aio_data;
    uint64_t aio_key_and_flags;
    uint16_t aio_lio_opcode;
    int16_t aio_reqprio;
    uint32_t aio_fildes;
    uint64_t aio_buf;
    uint64_t aio_nbytes;
    int64_t aio_offset;
    uint64_t aio_reserved;
    uint32_t aio_flags;
    uint32_t aio_resfd;
};
"""


def write(path: Path) -> None:
    """Write the module to ``path``."""
    builder = cffi.FFI()
    builder.cdef(DECLARATIONS)
    builder.set_source("vdpabridge.linux._libc", None)
    builder.emit_python_code(str(path))


if __name__ == "__main__":
    write(Path(__file__).with_name("_libc.py"))
