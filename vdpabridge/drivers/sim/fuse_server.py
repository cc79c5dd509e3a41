"""A FUSE server of read-only files, in memory or in a folder.

What it remembers between requests makes virtio-fs a stateful device: which inodes the guest knows by which number, and
which files it has open.

Source: include/uapi/linux/fuse.h and fs/fuse of Linux 7.2.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Sized

from ...abi.fuse import (
    DIRENT_ALIGN_BYTES,
    FUSE_ASYNC_READ,
    FUSE_ATTR,
    FUSE_ATTR_OUT,
    FUSE_BATCH_FORGET_IN,
    FUSE_DIRENT,
    FUSE_ENTRY_OUT,
    FUSE_FORGET_IN,
    FUSE_FORGET_ONE,
    FUSE_IN_HEADER,
    FUSE_INIT_IN,
    FUSE_INIT_OUT,
    FUSE_KERNEL_VERSION,
    FUSE_KSTATFS,
    FUSE_OPEN_IN,
    FUSE_OPEN_OUT,
    FUSE_OUT_HEADER,
    FUSE_PARALLEL_DIROPS,
    FUSE_READ_IN,
    FUSE_RELEASE_IN,
    FUSE_ROOT_ID,
    FuseOpcode,
)
from .fuse_session import KNOWN_MAX, FuseSession, Handle, Inode
from .tree import Directory, Node, find

__all__ = ["FuseServer"]

_MINOR = 31
_WRITE_BYTES_MAX = 1 << 17
#: More than a driver asks for: without FUSE_MAX_PAGES, which INIT does not offer, that is 32 pages.
_READ_BYTES_MAX = 1 << 20
_BLOCK_BYTES = 4096
_WRITING = 0o3  # O_WRONLY | O_RDWR
_DT_DIR, _DT_REG = 4, 8
_UNKNOWN_INODE = 0xFFFFFFFF
#: Requests that have no answer.
_SILENT = (FuseOpcode.FUSE_FORGET, FuseOpcode.FUSE_BATCH_FORGET, FuseOpcode.FUSE_INTERRUPT)


class _Refused(Exception):
    def __init__(self, code: int) -> None:
        self.errno = code


class FuseServer:
    """Answers requests about ``tree``. `session` may be replaced between two requests."""

    def __init__(self, tree: Directory) -> None:
        self._tree = tree
        self.session = FuseSession()
        self._numbers: dict[str, int] = {}
        self._of_session: FuseSession | None = None
        self._listing: tuple[tuple[FuseSession, int] | None, list[tuple[str, int]]] = (None, [])
        """The session and the handle of the directory that was read last, and what it lists."""
        ask: dict[FuseOpcode, Callable[[int, bytes], bytes]] = {
            FuseOpcode.FUSE_INIT: self._init,
            FuseOpcode.FUSE_DESTROY: self._destroy,
            FuseOpcode.FUSE_LOOKUP: self._lookup,
            FuseOpcode.FUSE_FORGET: self._forget,
            FuseOpcode.FUSE_BATCH_FORGET: self._batch_forget,
            FuseOpcode.FUSE_GETATTR: self._getattr,
            FuseOpcode.FUSE_OPEN: self._open,
            FuseOpcode.FUSE_OPENDIR: self._opendir,
            FuseOpcode.FUSE_READ: self._read,
            FuseOpcode.FUSE_READDIR: self._readdir,
            FuseOpcode.FUSE_RELEASE: self._release,
            FuseOpcode.FUSE_RELEASEDIR: self._release,
            FuseOpcode.FUSE_FLUSH: lambda _nodeid, _body: b"",
            FuseOpcode.FUSE_INTERRUPT: lambda _nodeid, _body: b"",
            FuseOpcode.FUSE_STATFS: self._statfs,
        }
        self._operations = ask

    def answer(self, request: bytes) -> bytes | None:
        """The answer to ``request``; None if it gets none. ValueError if it is not a request."""
        if len(request) < FUSE_IN_HEADER.size_bytes:
            raise ValueError(f"a FUSE request of {len(request)} bytes")
        size, opcode, unique, nodeid, *_ = FUSE_IN_HEADER.unpack(request)
        error, body = 0, b""
        try:
            operation = self._operations.get(opcode)
            if operation is None:
                raise _Refused(errno.ENOSYS if opcode not in _CHANGES else errno.EROFS)
            if not self.session.minor and opcode not in (FuseOpcode.FUSE_INIT, FuseOpcode.FUSE_DESTROY):
                raise _Refused(errno.EIO)
            body = operation(nodeid, request[FUSE_IN_HEADER.size_bytes : max(size, FUSE_IN_HEADER.size_bytes)])
        except _Refused as refused:
            error = -refused.errno
        except OSError as failed:
            # of a folder on disk
            error = -(failed.errno or errno.EIO)
        if opcode in _SILENT:
            return None
        return FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size_bytes + len(body), error, unique) + body

    @staticmethod
    def refusal(request: bytes, code: int) -> bytes | None:
        """The answer to ``request`` that says ``code``, an errno."""
        _, opcode, unique, *_ = FUSE_IN_HEADER.unpack(request)
        return None if opcode in _SILENT else FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size_bytes, -code, unique)

    # --- the session ---

    def _init(self, _nodeid: int, body: bytes) -> bytes:
        major, minor, readahead, flags, *_ = FUSE_INIT_IN.unpack(body.ljust(FUSE_INIT_IN.size_bytes, b"\0"))
        if major > FUSE_KERNEL_VERSION:
            # the driver asks again, with the version that this answer names
            return FUSE_INIT_OUT.pack(FUSE_KERNEL_VERSION, _MINOR, *(0,) * 9)
        if major < FUSE_KERNEL_VERSION or minor < _MINOR:
            # the first Linux with virtiofs has FUSE 7.31
            raise _Refused(errno.EPROTO)
        accepted = flags & (FUSE_ASYNC_READ | FUSE_PARALLEL_DIROPS)
        self.session = FuseSession(minor=_MINOR, flags=accepted)
        return FUSE_INIT_OUT.pack(
            FUSE_KERNEL_VERSION, _MINOR, readahead, accepted, 16, 12, _WRITE_BYTES_MAX, 1, 0, 0, 0
        )

    def _destroy(self, _nodeid: int, _body: bytes) -> bytes:
        self.session = FuseSession()
        return b""

    # --- inodes ---

    def _lookup(self, nodeid: int, body: bytes) -> bytes:
        parent = self._inode(nodeid)
        name = body.split(b"\0")[0].decode(errors="surrogateescape")
        if not name or "/" in name:
            raise _Refused(errno.EINVAL)
        path = f"{parent.path}/{name}".lstrip("/")
        node = find(self._tree, path)
        if node is None or not isinstance(find(self._tree, parent.path), Directory):
            raise _Refused(errno.ENOENT)
        number = self._number_of(path)
        if number is None:
            self._check_room(self.session.inodes)
            number = self.session.next_nodeid
            self.session.next_nodeid += 1
            self.session.inodes[number] = Inode(path, 0)
            self._numbers[path] = number
        self.session.inodes[number].lookups += 1
        # valid for 0 s: the guest looks a name up again for every use
        return FUSE_ENTRY_OUT.pack(number, 0, 0, 0, 0, 0, _attributes(number, node))

    def _number_of(self, path: str) -> int | None:
        if self._of_session is not self.session:
            self._of_session = self.session
            self._numbers = {inode.path: number for number, inode in self.session.inodes.items()}
        return self._numbers.get(path)

    def _forget(self, nodeid: int, body: bytes) -> bytes:
        self._drop(nodeid, FUSE_FORGET_IN.unpack(_exactly(body, FUSE_FORGET_IN.size_bytes))[0])
        return b""

    def _batch_forget(self, _nodeid: int, body: bytes) -> bytes:
        head, each = FUSE_BATCH_FORGET_IN.size_bytes, FUSE_FORGET_ONE.size_bytes
        count, _ = FUSE_BATCH_FORGET_IN.unpack(_exactly(body, head))
        for at in range(head, min(len(body), head + count * each) - each + 1, each):
            self._drop(*FUSE_FORGET_ONE.unpack(body, at))
        return b""

    def _drop(self, nodeid: int, lookups: int) -> None:
        inode = self.session.inodes.get(nodeid)
        if inode is None or nodeid == FUSE_ROOT_ID:
            return
        inode.lookups = max(0, inode.lookups - lookups)
        self._drop_unused(nodeid)

    def _drop_unused(self, nodeid: int) -> None:
        """Forget an inode that the guest neither knows nor has open: on its own queue, FORGET may overtake RELEASE."""
        inode = self.session.inodes[nodeid]
        if inode.lookups == 0 and inode.opens == 0:
            self._number_of(inode.path)
            self._numbers.pop(inode.path, None)
            del self.session.inodes[nodeid]

    @staticmethod
    def _check_room(table: Sized) -> None:
        if len(table) >= KNOWN_MAX:
            raise _Refused(errno.ENFILE)

    def _getattr(self, nodeid: int, _body: bytes) -> bytes:
        return FUSE_ATTR_OUT.pack(0, 0, 0, _attributes(nodeid, self._node(nodeid)))

    # --- open files ---

    def _open(self, nodeid: int, body: bytes) -> bytes:
        flags, _ = FUSE_OPEN_IN.unpack(_exactly(body, FUSE_OPEN_IN.size_bytes))
        if isinstance(self._node(nodeid), Directory):
            raise _Refused(errno.EISDIR)
        if flags & _WRITING:
            raise _Refused(errno.EROFS)
        return self._new_handle(nodeid, directory=False)

    def _opendir(self, nodeid: int, _body: bytes) -> bytes:
        if not isinstance(self._node(nodeid), Directory):
            raise _Refused(errno.ENOTDIR)
        return self._new_handle(nodeid, directory=True)

    def _new_handle(self, nodeid: int, *, directory: bool) -> bytes:
        self._check_room(self.session.handles)
        number = self.session.next_handle
        self.session.next_handle += 1
        self.session.inodes[nodeid].opens += 1
        self.session.handles[number] = Handle(nodeid, directory)
        return FUSE_OPEN_OUT.pack(number, 0)

    def _read(self, _nodeid: int, body: bytes) -> bytes:
        number, offset, size, *_ = FUSE_READ_IN.unpack(_exactly(body, FUSE_READ_IN.size_bytes))
        node = self._node(self._handle(number, directory=False).nodeid)
        if isinstance(node, Directory):
            return b""
        try:
            return node.read(offset, min(size, _READ_BYTES_MAX))
        except OverflowError:
            raise _Refused(errno.EINVAL) from None

    def _readdir(self, _nodeid: int, body: bytes) -> bytes:
        number, offset, size, *_ = FUSE_READ_IN.unpack(_exactly(body, FUSE_READ_IN.size_bytes))
        inode = self._inode(self._handle(number, directory=True).nodeid)
        listing = b""
        entries = self._listing_for(number, offset, inode.path)
        for position, (name, kind) in enumerate(entries[offset:], offset + 1):
            encoded = name.encode(errors="surrogateescape")
            known = self._number_of(f"{inode.path}/{name}".lstrip("/"))
            record = FUSE_DIRENT.pack(known or _UNKNOWN_INODE, position, len(encoded), kind) + encoded
            record += bytes(-len(record) % DIRENT_ALIGN_BYTES)
            if len(listing) + len(record) > size:
                if not listing:
                    raise _Refused(errno.EINVAL)
                break
            listing += record
        return listing

    def _listing_for(self, handle: int, offset: int, path: str) -> list[tuple[str, int]]:
        """What open directory ``handle`` lists: read anew from its beginning, and kept for the requests that follow."""
        of = self.session, handle
        if offset == 0 or self._listing[0] != of:
            directory = find(self._tree, path)
            if not isinstance(directory, Directory):
                raise _Refused(errno.ESTALE)
            entries = [(name, _DT_DIR if folder else _DT_REG) for name, folder in directory.listing()]
            self._listing = of, [(".", _DT_DIR), ("..", _DT_DIR), *entries]
        return self._listing[1]

    def _release(self, _nodeid: int, body: bytes) -> bytes:
        number, *_ = FUSE_RELEASE_IN.unpack(_exactly(body, FUSE_RELEASE_IN.size_bytes))
        handle = self.session.handles.pop(number, None)
        if handle is None:
            raise _Refused(errno.EBADF)
        self.session.inodes[handle.nodeid].opens -= 1
        if handle.nodeid != FUSE_ROOT_ID:
            self._drop_unused(handle.nodeid)
        return b""

    def _statfs(self, _nodeid: int, _body: bytes) -> bytes:
        return FUSE_KSTATFS.pack(0, 0, 0, len(self.session.inodes), 0, _BLOCK_BYTES, 255, _BLOCK_BYTES, 0, b"")

    # --- looking up ---

    def _inode(self, nodeid: int) -> Inode:
        inode = self.session.inodes.get(nodeid)
        if inode is None:
            raise _Refused(errno.ESTALE)
        return inode

    def _node(self, nodeid: int) -> Node:
        node = find(self._tree, self._inode(nodeid).path)
        if node is None:
            raise _Refused(errno.ESTALE)
        return node

    def _handle(self, number: int, *, directory: bool) -> Handle:
        handle = self.session.handles.get(number)
        if handle is None or handle.directory != directory:
            raise _Refused(errno.EBADF)
        return handle


#: Requests that would change the file system, which is read-only.
_CHANGES = {
    FuseOpcode.FUSE_SETATTR,
    FuseOpcode.FUSE_SYMLINK,
    FuseOpcode.FUSE_MKNOD,
    FuseOpcode.FUSE_MKDIR,
    FuseOpcode.FUSE_UNLINK,
    FuseOpcode.FUSE_RMDIR,
    FuseOpcode.FUSE_RENAME,
    FuseOpcode.FUSE_RENAME2,
    FuseOpcode.FUSE_LINK,
    FuseOpcode.FUSE_WRITE,
    FuseOpcode.FUSE_CREATE,
    FuseOpcode.FUSE_TMPFILE,
    FuseOpcode.FUSE_FALLOCATE,
}


def _attributes(number: int, node: Node) -> bytes:
    directory = isinstance(node, Directory)
    size = 0 if isinstance(node, Directory) else node.size_bytes
    mode = stat.S_IFDIR | 0o555 if directory else stat.S_IFREG | 0o444
    blocks = -(-size // 512)
    links = 2 if directory else 1
    return FUSE_ATTR.pack(number, size, blocks, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, _BLOCK_BYTES, 0)


def _exactly(body: bytes, size: int) -> bytes:
    """The first ``size`` bytes of ``body``; EINVAL if there are fewer."""
    if len(body) < size:
        raise _Refused(errno.EINVAL)
    return body[:size]
