"""FUSE as virtio-fs carries it: opcodes, flags, structures.

Source: include/uapi/linux/fuse.h of Linux 7.2; VIRTIO 1.4 section 5.11.6. Byte order is the guest's.
"""

from __future__ import annotations

from enum import IntEnum

from .layout import Layout

FUSE_KERNEL_VERSION = 7
FUSE_ROOT_ID = 1

FUSE_ASYNC_READ = 1 << 0
FUSE_BIG_WRITES = 1 << 5
FUSE_DO_READDIRPLUS = 1 << 13
FUSE_READDIRPLUS_AUTO = 1 << 14
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_MAX_PAGES = 1 << 22
FUSE_INIT_EXT = 1 << 30

FOPEN_KEEP_CACHE = 1 << 1
FUSE_GETATTR_FH = 1 << 0

FUSE_IN_HEADER = Layout(
    "fuse_in_header",
    "=",
    (
        ("len", "I"),
        ("opcode", "I"),
        ("unique", "Q"),
        ("nodeid", "Q"),
        ("uid", "I"),
        ("gid", "I"),
        ("pid", "I"),
        ("total_extlen", "H"),
        ("padding", "H"),
    ),
)
FUSE_OUT_HEADER = Layout("fuse_out_header", "=", (("len", "I"), ("error", "i"), ("unique", "Q")))
FUSE_INIT_IN = Layout(
    "fuse_init_in",
    "=",
    (("major", "I"), ("minor", "I"), ("max_readahead", "I"), ("flags", "I"), ("flags2", "I"), ("unused", "44s")),
)
FUSE_INIT_OUT = Layout(
    "fuse_init_out",
    "=",
    (
        ("major", "I"),
        ("minor", "I"),
        ("max_readahead", "I"),
        ("flags", "I"),
        ("max_background", "H"),
        ("congestion_threshold", "H"),
        ("max_write", "I"),
        ("time_gran", "I"),
        ("max_pages", "H"),
        ("map_alignment", "H"),
        ("flags2", "I"),
        # Linux 7.2 has two members and a spare here; older kernels have only a spare
        ("", "28x"),
    ),
)
FUSE_ATTR = Layout(
    "fuse_attr",
    "=",
    (
        ("ino", "Q"),
        ("size", "Q"),
        ("blocks", "Q"),
        ("atime", "Q"),
        ("mtime", "Q"),
        ("ctime", "Q"),
        ("atimensec", "I"),
        ("mtimensec", "I"),
        ("ctimensec", "I"),
        ("mode", "I"),
        ("nlink", "I"),
        ("uid", "I"),
        ("gid", "I"),
        ("rdev", "I"),
        ("blksize", "I"),
        ("flags", "I"),
    ),
)
FUSE_ENTRY_OUT = Layout(
    "fuse_entry_out",
    "=",
    (
        ("nodeid", "Q"),
        ("generation", "Q"),
        ("entry_valid", "Q"),
        ("attr_valid", "Q"),
        ("entry_valid_nsec", "I"),
        ("attr_valid_nsec", "I"),
        ("attr", f"{FUSE_ATTR.size_bytes}s"),
    ),
)
FUSE_GETATTR_IN = Layout("fuse_getattr_in", "=", (("getattr_flags", "I"), ("dummy", "I"), ("fh", "Q")))
FUSE_ATTR_OUT = Layout(
    "fuse_attr_out",
    "=",
    (("attr_valid", "Q"), ("attr_valid_nsec", "I"), ("dummy", "I"), ("attr", f"{FUSE_ATTR.size_bytes}s")),
)
FUSE_OPEN_IN = Layout("fuse_open_in", "=", (("flags", "I"), ("open_flags", "I")))
FUSE_OPEN_OUT = Layout("fuse_open_out", "=", (("fh", "Q"), ("open_flags", "I"), ("", "4x")))
FUSE_READ_IN = Layout(
    "fuse_read_in",
    "=",
    (
        ("fh", "Q"),
        ("offset", "Q"),
        ("size", "I"),
        ("read_flags", "I"),
        ("lock_owner", "Q"),
        ("flags", "I"),
        ("padding", "I"),
    ),
)
FUSE_RELEASE_IN = Layout(
    "fuse_release_in", "=", (("fh", "Q"), ("flags", "I"), ("release_flags", "I"), ("lock_owner", "Q"))
)
FUSE_FORGET_IN = Layout("fuse_forget_in", "=", (("nlookup", "Q"),))
FUSE_FORGET_ONE = Layout("fuse_forget_one", "=", (("nodeid", "Q"), ("nlookup", "Q")))
FUSE_BATCH_FORGET_IN = Layout("fuse_batch_forget_in", "=", (("count", "I"), ("dummy", "I")))
FUSE_KSTATFS = Layout(
    "fuse_kstatfs",
    "=",
    (
        ("blocks", "Q"),
        ("bfree", "Q"),
        ("bavail", "Q"),
        ("files", "Q"),
        ("ffree", "Q"),
        ("bsize", "I"),
        ("namelen", "I"),
        ("frsize", "I"),
        ("padding", "I"),
        ("spare", "24s"),
    ),
)
#: The name follows, padded to `DIRENT_ALIGN_BYTES`.
FUSE_DIRENT = Layout("fuse_dirent", "=", (("ino", "Q"), ("off", "Q"), ("namelen", "I"), ("type", "I")))
DIRENT_ALIGN_BYTES = 8


class FuseOpcode(IntEnum):
    """What a request asks for."""

    FUSE_LOOKUP = 1
    FUSE_FORGET = 2
    FUSE_GETATTR = 3
    FUSE_SETATTR = 4
    FUSE_READLINK = 5
    FUSE_SYMLINK = 6
    FUSE_MKNOD = 8
    FUSE_MKDIR = 9
    FUSE_UNLINK = 10
    FUSE_RMDIR = 11
    FUSE_RENAME = 12
    FUSE_LINK = 13
    FUSE_OPEN = 14
    FUSE_READ = 15
    FUSE_WRITE = 16
    FUSE_STATFS = 17
    FUSE_RELEASE = 18
    FUSE_FSYNC = 20
    FUSE_SETXATTR = 21
    FUSE_GETXATTR = 22
    FUSE_LISTXATTR = 23
    FUSE_REMOVEXATTR = 24
    FUSE_FLUSH = 25
    FUSE_INIT = 26
    FUSE_OPENDIR = 27
    FUSE_READDIR = 28
    FUSE_RELEASEDIR = 29
    FUSE_FSYNCDIR = 30
    FUSE_GETLK = 31
    FUSE_SETLK = 32
    FUSE_SETLKW = 33
    FUSE_ACCESS = 34
    FUSE_CREATE = 35
    FUSE_INTERRUPT = 36
    FUSE_BMAP = 37
    FUSE_DESTROY = 38
    FUSE_IOCTL = 39
    FUSE_POLL = 40
    FUSE_NOTIFY_REPLY = 41
    FUSE_BATCH_FORGET = 42
    FUSE_FALLOCATE = 43
    FUSE_READDIRPLUS = 44
    FUSE_RENAME2 = 45
    FUSE_LSEEK = 46
    FUSE_COPY_FILE_RANGE = 47
    FUSE_SETUPMAPPING = 48
    FUSE_REMOVEMAPPING = 49
    FUSE_SYNCFS = 50
    FUSE_TMPFILE = 51
    FUSE_STATX = 52


__all__ = [name for name in globals() if name.startswith(("FUSE_", "FOPEN_", "DIRENT_"))] + ["FuseOpcode"]
