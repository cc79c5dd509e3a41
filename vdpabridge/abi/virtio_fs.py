"""virtio-fs: config space.

Source: include/uapi/linux/virtio_fs.h of Linux 7.2; VIRTIO 1.4 section 5.11.
"""

from __future__ import annotations

from .layout import Layout

VIRTIO_FS_SHMCAP_ID_CACHE = 0

VIRTIO_FS_CONFIG = Layout("virtio_fs_config", "<", (("tag", "36s"), ("num_request_queues", "I")))

__all__ = [name for name in globals() if name.startswith("VIRTIO_")]
