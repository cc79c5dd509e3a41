"""A virtio-fs device.

Source: VIRTIO 1.4 section 5.11.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

from ...abi.fuse import FUSE_IN_HEADER
from ...abi.virtio import VIRTIO_ID_FS
from ...abi.virtio_fs import VIRTIO_FS_CONFIG
from .fuse_server import FuseServer
from .fuse_session import FuseSession, pack_session, unpack_session
from .model import Loaded, Model
from .ring import Chain
from .tree import Directory, default_tree, find

__all__ = ["FsModel"]

_TAG_BYTES = 36


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
    def session(self) -> FuseSession:
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
        return pack_session(self.session)

    def load(self, chunks: Iterable[bytes]) -> Loaded:
        session = unpack_session(chunks, self._is_shared)

        def commit() -> None:
            self._server.session = session

        return Loaded(commit)

    def _is_shared(self, path: str) -> bool:
        """Whether the server knows a file by ``path``: it knows none by a path with a slash too many."""
        return path == "/".join(filter(None, path.split("/"))) and find(self._tree, path) is not None

    def reset(self) -> None:
        self._server.session = FuseSession()

    def close(self) -> None:
        self._tree.close()
