"""FUSE requests on a virtio-fs device's queues: what a guest's virtiofs driver does, in miniature.

Source: VIRTIO 1.4 section 5.11.6; include/uapi/linux/fuse.h of Linux 7.2.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from ..abi.fuse import (
    DIRENT_ALIGN_BYTES,
    FUSE_ATTR,
    FUSE_ATTR_OUT,
    FUSE_DIRENT,
    FUSE_ENTRY_OUT,
    FUSE_FORGET_IN,
    FUSE_GETATTR_IN,
    FUSE_IN_HEADER,
    FUSE_INIT_IN,
    FUSE_INIT_OUT,
    FUSE_KERNEL_VERSION,
    FUSE_OPEN_IN,
    FUSE_OPEN_OUT,
    FUSE_OUT_HEADER,
    FUSE_READ_IN,
    FUSE_RELEASE_IN,
    FUSE_ROOT_ID,
    FuseOpcode,
)
from ..errors import VdpaBridgeError, errno_name
from ..linux.deadline import Deadline
from .memory import GuestMemory
from .virtqueue import SplitQueue

__all__ = ["Entry", "FuseDriver", "FuseError"]

_MINOR = 31
#: The most that one read asks for, and the room for the rest of a request or answer.
READ_BYTES_MAX = 1 << 17
_HEAD_ROOM_BYTES = 4096


class FuseError(VdpaBridgeError):
    """The file server refused, or its answer is not valid: then ``errno`` is 0 or EPROTO, else the server's own."""

    def __init__(self, opcode: FuseOpcode, nodeid: int, code: int, why: str = "") -> None:
        super().__init__(f"{opcode.name} of inode {nodeid}", why=why or f"{errno_name(code)}: {os.strerror(code)}")
        self.errno = code


@dataclass(frozen=True, slots=True)
class Entry:
    """What a lookup finds."""

    nodeid: int
    size_bytes: int
    mode: int


class FuseDriver:
    """One request at a time on ``requests``, forgetting on ``hiprio`` (queue 0 of the device). Both are borrowed."""

    def __init__(self, memory: GuestMemory, hiprio: SplitQueue, requests: SplitQueue, *, timeout_s: float = 30) -> None:
        self._memory = memory
        self._hiprio = hiprio
        self._requests = requests
        self._timeout_s = timeout_s
        self._question = memory.allocate(_HEAD_ROOM_BYTES)
        self._answer = memory.allocate(READ_BYTES_MAX + _HEAD_ROOM_BYTES)
        self._unique = 0
        self._stuck = False

    def init(self) -> int:
        """Begin a session; returns the minor version agreed on."""
        body = FUSE_INIT_IN.pack(FUSE_KERNEL_VERSION, _MINOR, 1 << 17, 0, 0, b"")
        answer = self._ask(FuseOpcode.FUSE_INIT, 0, body, FUSE_INIT_OUT.size_bytes)
        minor: int = FUSE_INIT_OUT.unpack(answer)[1]
        return min(minor, _MINOR)

    def lookup(self, parent: int, name: str) -> Entry:
        """The file called ``name`` in directory ``parent``; the server knows it from now on, until `forget`."""
        body = name.encode(errors="surrogateescape") + b"\0"
        answer = self._ask(FuseOpcode.FUSE_LOOKUP, parent, body, FUSE_ENTRY_OUT.size_bytes)
        nodeid, *_, attributes = FUSE_ENTRY_OUT.unpack(answer)
        if not nodeid:  # FUSE says so for how long the name does not exist
            raise FuseError(FuseOpcode.FUSE_LOOKUP, parent, errno.ENOENT)
        facts = FUSE_ATTR.decode(attributes)
        return Entry(nodeid, facts["size"], facts["mode"])

    def walk(self, path: str) -> Entry:
        """Look ``path`` up from the root, name by name. The root itself is not a path."""
        nodeid = FUSE_ROOT_ID
        for name in path.split("/"):
            entry = self.lookup(nodeid, name)
            nodeid = entry.nodeid
        return entry

    def getattr(self, nodeid: int) -> Entry:
        """The attributes of a file that was looked up."""
        body = FUSE_GETATTR_IN.pack(0, 0, 0)
        answer = self._ask(FuseOpcode.FUSE_GETATTR, nodeid, body, FUSE_ATTR_OUT.size_bytes)
        facts = FUSE_ATTR.decode(FUSE_ATTR_OUT.unpack(answer)[3])
        return Entry(nodeid, facts["size"], facts["mode"])

    def open(self, nodeid: int, flags: int = os.O_RDONLY) -> int:
        """A handle of a file."""
        answer = self._ask(FuseOpcode.FUSE_OPEN, nodeid, FUSE_OPEN_IN.pack(flags, 0), FUSE_OPEN_OUT.size_bytes)
        return int(FUSE_OPEN_OUT.unpack(answer)[0])

    def opendir(self, nodeid: int) -> int:
        """A handle of a directory."""
        answer = self._ask(FuseOpcode.FUSE_OPENDIR, nodeid, FUSE_OPEN_IN.pack(0, 0), FUSE_OPEN_OUT.size_bytes)
        return int(FUSE_OPEN_OUT.unpack(answer)[0])

    def read(self, nodeid: int, handle: int, offset: int, size_bytes: int) -> bytes:
        """Up to ``size_bytes`` of an open file."""
        body = FUSE_READ_IN.pack(handle, offset, size_bytes, 0, 0, 0, 0)
        return self._ask(FuseOpcode.FUSE_READ, nodeid, body, size_bytes, exactly=False)

    def readdir(self, nodeid: int, handle: int) -> Iterator[str]:
        """The names in an open directory."""
        offset = 0
        while True:
            body = FUSE_READ_IN.pack(handle, offset, _HEAD_ROOM_BYTES, 0, 0, 0, 0)
            listing = self._ask(FuseOpcode.FUSE_READDIR, nodeid, body, _HEAD_ROOM_BYTES, exactly=False)
            if not listing:
                return
            at = 0
            while at < len(listing):
                _, offset, length, _ = FUSE_DIRENT.unpack(listing, at)
                at += FUSE_DIRENT.size_bytes
                yield listing[at : at + length].decode(errors="surrogateescape")
                at += -(-length // DIRENT_ALIGN_BYTES) * DIRENT_ALIGN_BYTES

    def release(self, nodeid: int, handle: int, *, directory: bool = False) -> None:
        """Close a handle."""
        opcode = FuseOpcode.FUSE_RELEASEDIR if directory else FuseOpcode.FUSE_RELEASE
        self._ask(opcode, nodeid, FUSE_RELEASE_IN.pack(handle, 0, 0, 0), 0)

    def forget(self, nodeid: int, lookups: int = 1) -> None:
        """Take back ``lookups`` of a file's lookups. There is no answer, but the device returns the buffer."""
        question = self._header(FuseOpcode.FUSE_FORGET, nodeid, FUSE_FORGET_IN.pack(lookups))
        self._memory.slice(self._question, len(question))[:] = question
        self._exchange(self._hiprio, [(self._question, len(question))], [])

    def _header(self, opcode: FuseOpcode, nodeid: int, body: bytes) -> bytes:
        self._unique += 2  # as the kernel does: odd numbers are for its interrupts
        return (
            FUSE_IN_HEADER.pack(FUSE_IN_HEADER.size_bytes + len(body), opcode, self._unique, nodeid, 0, 0, 1, 0, 0)
            + body
        )

    def _ask(self, opcode: FuseOpcode, nodeid: int, body: bytes, answer_bytes: int, *, exactly: bool = True) -> bytes:
        question = self._header(opcode, nodeid, body)
        if len(question) > _HEAD_ROOM_BYTES or answer_bytes > READ_BYTES_MAX:
            raise ValueError(f"{opcode.name}: {len(question)} bytes to send and {answer_bytes} to receive do not fit")
        self._memory.slice(self._question, len(question))[:] = question
        # header and body apart, as Linux has them: virtiofsd requires it
        head = FUSE_IN_HEADER.size_bytes
        readable = [(self._question, head), (self._question + head, len(question) - head)]
        room = FUSE_OUT_HEADER.size_bytes + answer_bytes
        written = self._exchange(self._requests, readable, [(self._answer, room)])
        answer = bytes(self._memory.slice(self._answer, min(written, room)))
        return self._body(opcode, nodeid, answer, answer_bytes if exactly else None)

    def _body(self, opcode: FuseOpcode, nodeid: int, answer: bytes, expected_bytes: int | None) -> bytes:
        if len(answer) < FUSE_OUT_HEADER.size_bytes:
            raise FuseError(opcode, nodeid, 0, f"an answer of {len(answer)} bytes")
        size, error, unique = FUSE_OUT_HEADER.unpack(answer)
        if unique != self._unique or size != len(answer):
            raise FuseError(opcode, nodeid, 0, f"an answer to request {unique} of {size} bytes, {len(answer)} came")
        if error:
            raise FuseError(opcode, nodeid, -error)
        body = answer[FUSE_OUT_HEADER.size_bytes :]
        if expected_bytes is not None and len(body) != expected_bytes:
            raise FuseError(opcode, nodeid, errno.EPROTO, f"an answer of {len(body)} bytes, not {expected_bytes}")
        return body

    def _exchange(self, queue: SplitQueue, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> int:
        """Submit, kick, wait; returns the bytes that the device wrote."""
        if self._stuck:
            why = "an earlier request was not answered, and the device still has its buffers"
            raise VdpaBridgeError("FUSE request", why=why, hint="begin again, with another driver")
        deadline = Deadline(self._timeout_s)
        self._stuck = True
        head = queue.add([piece for piece in readable if piece[1]], writable)
        queue.kick()
        while True:
            for used, written in queue.used():
                if used == head:
                    self._stuck = False
                    return written
            queue.wait(deadline)
