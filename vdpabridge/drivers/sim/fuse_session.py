"""What a FUSE server remembers between requests, and its form as device state.

A first chunk ``minor:u32 flags:u32 next_nodeid:u64 next_handle:u64 inode_count:u32 handle_count:u32``; then chunks of
whole records: all inodes ``nodeid:u64 lookups:u64 path_bytes:u16 path``, then all handles ``handle:u64 nodeid:u64
directory:u8``. Little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ...abi.fuse import FUSE_ROOT_ID
from .model import StateRefused
from .stream import CHUNK_BYTES_MAX

__all__ = ["KNOWN_MAX", "FuseSession", "Handle", "Inode", "pack_session", "unpack_session"]

#: Inodes that a guest may know, and handles that it may have.
KNOWN_MAX = 1 << 17
#: The most that the next numbers and the counts of lookups may be in a state: they still have to grow.
_COUNT_MAX = 1 << 62

#: Characters of a path that an error shows.
_NAME_SHOWN = 200

_HEAD = struct.Struct("<IIQQII")
_INODE = struct.Struct("<QQH")
_HANDLE = struct.Struct("<QQB")


@dataclass(slots=True)
class Inode:
    """A file that the guest knows: where it is, how often it was looked up and not forgotten, how often it is open."""

    path: str
    lookups: int
    opens: int = 0


@dataclass(slots=True)
class Handle:
    """A file or directory that the guest has open."""

    nodeid: int
    directory: bool


@dataclass(slots=True)
class FuseSession:
    """All that the server remembers: the device's internal state."""

    minor: int = 0
    """The minor FUSE version agreed on; 0 before INIT."""
    flags: int = 0
    inodes: dict[int, Inode] = field(default_factory=lambda: {FUSE_ROOT_ID: Inode("", 1)})
    handles: dict[int, Handle] = field(default_factory=dict)
    next_nodeid: int = FUSE_ROOT_ID + 1
    next_handle: int = 1


def pack_session(session: FuseSession) -> Iterator[bytes]:
    """``session`` in chunks."""
    counts = len(session.inodes), len(session.handles)
    yield _HEAD.pack(session.minor, session.flags, session.next_nodeid, session.next_handle, *counts)
    yield from _chunks(_pack_inode(number, inode) for number, inode in session.inodes.items())
    yield from _chunks(_HANDLE.pack(number, it.nodeid, it.directory) for number, it in session.handles.items())


def _pack_inode(number: int, inode: Inode) -> bytes:
    path = inode.path.encode(errors="surrogateescape")
    return _INODE.pack(number, inode.lookups, len(path)) + path


def _chunks(records: Iterable[bytes]) -> Iterator[bytes]:
    """``records``, as many to a chunk as fit."""
    chunk = bytearray()
    for record in records:
        if len(chunk) + len(record) > CHUNK_BYTES_MAX:
            yield bytes(chunk)
            chunk.clear()
        chunk += record
    if chunk:
        yield bytes(chunk)


def unpack_session(chunks: Iterable[bytes], is_shared: Callable[[str], bool]) -> FuseSession:
    """The session in ``chunks``, all of which are read. Raises `StateRefused`, and what ``chunks`` raises.

    It has only files that ``is_shared`` confirms, so that it is not larger than the tree allows.
    """
    content = iter(chunks)
    try:
        minor, flags, next_nodeid, next_handle, inode_count, handle_count = _HEAD.unpack(next(content, b""))
        if max(inode_count, handle_count) > KNOWN_MAX:
            raise StateRefused(f"it has {max(inode_count, handle_count)} inodes or handles, more than {KNOWN_MAX}")
        session = FuseSession(minor, flags, {}, {}, next_nodeid, next_handle)
        for chunk in content:
            at = 0
            while at < len(chunk):
                if len(session.inodes) < inode_count:
                    at = _take_inode(session, chunk, at, is_shared)
                elif len(session.handles) < handle_count:
                    at = _take_handle(session, chunk, at)
                else:
                    raise StateRefused("it has more inodes or handles than it says")
    except struct.error as error:
        raise StateRefused(f"it is not a session of a file server: {error}") from None
    if (len(session.inodes), len(session.handles)) != (inode_count, handle_count):
        raise StateRefused("it has fewer inodes or handles than it says")
    _check_numbers(session)
    return session


def _take_inode(session: FuseSession, chunk: bytes, at: int, is_shared: Callable[[str], bool]) -> int:
    number, lookups, path_bytes = _INODE.unpack_from(chunk, at)
    begin = at + _INODE.size
    end: int = begin + path_bytes
    path = chunk[begin:end]
    if len(path) < path_bytes or number in session.inodes:
        raise StateRefused(f"inode {number} is cut off, or comes twice")
    name = path.decode(errors="surrogateescape")
    if not is_shared(name):
        raise StateRefused(f"inode {number} is {name[:_NAME_SHOWN]!r}, which is not shared here")
    session.inodes[number] = Inode(name, lookups)
    return end


def _take_handle(session: FuseSession, chunk: bytes, at: int) -> int:
    number, nodeid, directory = _HANDLE.unpack_from(chunk, at)
    if number in session.handles:
        raise StateRefused(f"handle {number} comes twice")
    inode = session.inodes.get(nodeid)
    if inode is None:
        raise StateRefused(f"handle {number} is of inode {nodeid}, which it does not have")
    inode.opens += 1
    session.handles[number] = Handle(nodeid, bool(directory))
    return at + _HANDLE.size


def _check_numbers(session: FuseSession) -> None:
    if FUSE_ROOT_ID not in session.inodes or session.next_nodeid <= max(session.inodes):
        raise StateRefused("its inode numbers do not fit together")
    if session.next_handle <= max(session.handles, default=0):
        raise StateRefused("its handle numbers do not fit together")
    counts = (session.next_nodeid, session.next_handle, *(inode.lookups for inode in session.inodes.values()))
    if max(counts) > _COUNT_MAX:
        raise StateRefused(f"it has counted to {max(counts)}, further than any server does")
