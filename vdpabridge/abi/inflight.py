"""The in-flight region of split rings: a back-end notes in it which requests it has taken.

Source: docs/interop/vhost-user.rst, "Inflight I/O tracking". The back-end that makes a region chooses where each
queue's part lies in it. Here the parts follow each other, each aligned to 64 bytes, as in libvhost-user.
"""

from __future__ import annotations

from .layout import Layout

__all__ = ["DESC_STATE_SPLIT", "QUEUE_REGION_SPLIT", "VERSION", "queue_region_bytes"]

VERSION = 1
_ALIGN_BYTES = 64

#: ``desc[]`` follows.
QUEUE_REGION_SPLIT = Layout(
    "QueueRegionSplit",
    "=",
    (("features", "Q"), ("version", "H"), ("desc_num", "H"), ("last_batch_head", "H"), ("used_idx", "H")),
)
DESC_STATE_SPLIT = Layout(
    "DescStateSplit", "=", (("inflight", "B"), ("padding", "5s"), ("next", "H"), ("counter", "Q"))
)


def queue_region_bytes(queue_size: int) -> int:
    """The bytes of one queue's part of the region."""
    used = QUEUE_REGION_SPLIT.size_bytes + DESC_STATE_SPLIT.size_bytes * queue_size
    return -(-used // _ALIGN_BYTES) * _ALIGN_BYTES
