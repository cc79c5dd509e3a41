"""The virtqueue's layout in guest memory: flags, alignments, structures.

Source: include/uapi/linux/virtio_ring.h of Linux 7.2; VIRTIO 1.4 sections 2.7 and 2.8. All fields are little-endian
(VIRTIO_F_VERSION_1).
"""

from __future__ import annotations

from .layout import Layout

VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4
VRING_PACKED_DESC_F_AVAIL = 7
VRING_PACKED_DESC_F_USED = 15
VRING_USED_F_NO_NOTIFY = 1
VRING_AVAIL_F_NO_INTERRUPT = 1
VRING_PACKED_EVENT_FLAG_ENABLE = 0
VRING_PACKED_EVENT_FLAG_DISABLE = 1
VRING_PACKED_EVENT_FLAG_DESC = 2
VRING_PACKED_EVENT_F_WRAP_CTR = 15
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VRING_AVAIL_ALIGN_SIZE = 2
VRING_USED_ALIGN_SIZE = 4
VRING_DESC_ALIGN_SIZE = 16

VRING_DESC = Layout("vring_desc", "<", (("addr", "Q"), ("len", "I"), ("flags", "H"), ("next", "H")))
VRING_PACKED_DESC = Layout("vring_packed_desc", "<", (("addr", "Q"), ("len", "I"), ("id", "H"), ("flags", "H")))
VRING_USED_ELEM = Layout("vring_used_elem", "<", (("id", "I"), ("len", "I")))
#: ``struct vring_avail`` and ``struct vring_used`` up to their ``ring`` member.
VRING_AVAIL = Layout("vring_avail", "<", (("flags", "H"), ("idx", "H")))
VRING_USED = Layout("vring_used", "<", (("flags", "H"), ("idx", "H")))

__all__ = [name for name in globals() if name.startswith(("VRING_", "VIRTIO_"))]
__all__ += ["packed_ring_bytes", "split_ring_bytes"]


def split_ring_bytes(size: int) -> tuple[int, int, int]:
    """Bytes of the descriptor table, available and used ring of ``size`` descriptors (VIRTIO 1.4, 2.7).

    Without the two bytes for an event index, which a device need not touch.
    """
    return (
        VRING_DESC.size_bytes * size,
        VRING_AVAIL.size_bytes + 2 * size,
        VRING_USED.size_bytes + VRING_USED_ELEM.size_bytes * size,
    )


def packed_ring_bytes(size: int) -> tuple[int, int, int]:
    """Bytes of the descriptor ring and of the two event suppression structures (VIRTIO 1.4, 2.8)."""
    return VRING_PACKED_DESC.size_bytes * size, 4, 4
