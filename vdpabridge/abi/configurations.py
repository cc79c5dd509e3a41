"""Which structure a device's configuration space has."""

from __future__ import annotations

from collections.abc import Mapping

from .layout import Layout
from .virtio import VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET
from .virtio_blk import VIRTIO_BLK_CONFIG
from .virtio_fs import VIRTIO_FS_CONFIG
from .virtio_net import VIRTIO_NET_CONFIG

__all__ = ["CONFIGURATIONS"]

#: Virtio device id -> layout.
CONFIGURATIONS: Mapping[int, Layout] = {
    VIRTIO_ID_NET: VIRTIO_NET_CONFIG,
    VIRTIO_ID_BLOCK: VIRTIO_BLK_CONFIG,
    VIRTIO_ID_FS: VIRTIO_FS_CONFIG,
}
