"""A virtio-fs device.

Source: VIRTIO 1.4 section 5.11.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Iterable, Iterator
from typing import Any

from ...abi.fuse import FUSE_IN_HEADER, FUSE_ROOT_ID
from ...abi.virtio import VIRTIO_ID_FS
from ...abi.virtio_fs import VIRTIO_FS_CONFIG
from .fuse_server import FuseServer, Handle, Inode, Session
from .model import Loaded, Model, StateRefused, facts_of
from .ring import Chain
from .stream import CHUNK_BYTES_MAX
from .tree import Directory, default_tree, find

__all__ = ["FsModel"]

_TAG_BYTES = 36
#: More than as many inodes and handles as a session may have.
_STATE_BYTES_MAX = 256 << 20


class FsModel(Model):
    """Shares ``tree``; queue 0 is for forgetting, the others for everything. Without ``tag`` it has no config space."""

    device_id = VIRTIO_ID_FS
    features = 0

    def __init__(self, tree: Directory | None = None, *, tag: str = "", request_queues: int = 1) -> None:
        self._tree = default_tree() if tree is None else tree
        self._tag = tag.encode()
        if len(self._tag) > _TAG_BYTES:
            raise ValueError(f"a tag has at most {_TAG_BYTES} bytes, not {len(self._tag)}")
        self.queue_count = 1 + request_queues
        self._server = FuseServer(self._tree)

    @property
    def session(self) -> Session:
        """What the guest has looked up and opened."""
        return self._server.session

    def config(self) -> bytes:
        return VIRTIO_FS_CONFIG.pack(self._tag, self.queue_count - 1) if self._tag else b""

    def handle(self, chain: Chain, *, fail: bool) -> None:
        request = chain.read()
        if len(request) < FUSE_IN_HEADER.size_bytes:
            return
        answer = self._server.refusal(request, errno.EIO) if fail else self._server.answer(request)
        if answer is not None:
            chain.write(answer[: chain.room_bytes])

    def save(self) -> Iterator[bytes]:
        text = json.dumps(dataclasses.asdict(self.session)).encode()
        for at in range(0, len(text), CHUNK_BYTES_MAX):
            yield text[at : at + CHUNK_BYTES_MAX]

    def load(self, chunks: Iterable[bytes]) -> Loaded:
        text = b""
        for chunk in chunks:
            text += chunk
            if len(text) > _STATE_BYTES_MAX:
                raise StateRefused(f"it has more than {_STATE_BYTES_MAX} bytes")
        try:
            session = _session(facts_of(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateRefused(f"it is no session of a file server: {error}") from None
        for number, inode in session.inodes.items():
            if find(self._tree, inode.path) is None:
                raise StateRefused(f"inode {number} is {inode.path!r}, which is not shared here")
        for number, handle in session.handles.items():
            if handle.nodeid not in session.inodes:
                raise StateRefused(f"handle {number} is of inode {handle.nodeid}, which it does not have")

        def commit() -> None:
            self._server.session = session

        return Loaded(commit)

    def reset(self) -> None:
        self._server.session = Session()


def _session(facts: dict[str, Any]) -> Session:
    """The session that was saved; ValueError, KeyError or TypeError where ``facts`` are none."""
    session = Session(
        minor=int(facts["minor"]),
        flags=int(facts["flags"]),
        inodes={int(number): Inode(str(it["path"]), int(it["lookups"])) for number, it in facts["inodes"].items()},
        handles={
            int(number): Handle(int(it["nodeid"]), bool(it["directory"])) for number, it in facts["handles"].items()
        },
        next_nodeid=int(facts["next_nodeid"]),
        next_handle=int(facts["next_handle"]),
    )
    if FUSE_ROOT_ID not in session.inodes or session.next_nodeid <= max(session.inodes):
        raise ValueError("its inode numbers do not fit together")
    if session.next_handle <= max(session.handles, default=0):
        raise ValueError("its handle numbers do not fit together")
    return session
