"""The state image: magic, part headers and parts. `vdpabridge/state/IMAGE.md` is the specification.

Source: VIRTIO 1.4 "Device parts" for the header of a part and for types 0x100 to 0x104; this project defines the rest.
Everything is little-endian.
"""

from __future__ import annotations

from enum import IntEnum

from .layout import Layout
from .virtio import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
)

__all__ = [
    "COMPATIBLE_VERSION",
    "DIGEST_BYTES",
    "END",
    "HEADER",
    "HEADER_MAGIC",
    "IDENTITY",
    "IDENTITY_HAS_STATE",
    "OPTIONAL_PARTS",
    "PART_HEADER",
    "PART_OPTIONAL",
    "PART_SIZES",
    "PART_VALUE_BYTES_MAX",
    "REPEATED_PARTS",
    "REQUIRED_PARTS",
    "SELECTOR_INDEX",
    "STATUS_CONFIGURED",
    "STATUS_STARTED",
    "UNKNOWN_DEVICE_ID",
    "VERSION",
    "VQ_CFG",
    "VQ_POSITION",
    "PartType",
]

HEADER_MAGIC = b"vdpaIMG\n"
VERSION = 1
#: The oldest version whose readers understand what is written here.
COMPATIBLE_VERSION = 1
HEADER = Layout("image_header", "<", (("magic", "8s"), ("version", "H"), ("compatible", "H"), ("reserved", "I")))

#: ``struct virtio_dev_part_hdr``; the selector's meaning depends on the type.
PART_HEADER = Layout(
    "virtio_dev_part_hdr", "<", (("type", "H"), ("flags", "B"), ("reserved", "B"), ("selector", "8s"), ("length", "I"))
)
PART_OPTIONAL = 1
#: A limit, so that a reader needs no more memory than this, however large the image is.
PART_VALUE_BYTES_MAX = 1 << 20
#: A selector that is a queue's index, or a number.
SELECTOR_INDEX = Layout("selector", "<", (("index", "I"), ("reserved", "I")))


class PartType(IntEnum):
    """What a part is. The order here is the order in an image."""

    IDENTITY = 0xF000
    DEV_FEATURES = 0x100
    DRV_FEATURES = 0x101
    DEVICE_STATUS = 0x103
    VQ_CFG = 0x104
    VQ_POSITION = 0xF001
    CONFIG_SPACE = 0xF002
    DEVICE_STATE = 0xF003
    END = 0xF0FF


IDENTITY = Layout(
    "identity",
    "<",
    (("device_id", "I"), ("flags", "I"), ("queue_count", "I"), ("queue_size_max", "I"), ("config_size", "I")),
)
UNKNOWN_DEVICE_ID = 0xFFFFFFFF
IDENTITY_HAS_STATE = 1

#: ``struct virtio_dev_part_vq_cfg``.
VQ_CFG = Layout(
    "virtio_dev_part_vq_cfg",
    "<",
    (
        ("queue_size", "H"),
        ("vector", "H"),
        ("enabled", "H"),
        ("reserved", "H"),
        ("desc", "Q"),
        ("driver", "Q"),
        ("device", "Q"),
    ),
)
#: The word of VHOST_GET_VRING_BASE, and whether it is a packed ring's.
VQ_POSITION = Layout("vq_position", "<", (("word", "I"), ("packed", "I")))

DIGEST_BYTES = 32
END = Layout("end", "<", (("parts", "Q"), ("state_bytes", "Q"), ("digest", f"{DIGEST_BYTES}s")))

#: The values that DEVICE_STATUS may have: for a device that was set up, and for one that was running.
STATUS_CONFIGURED = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK
STATUS_STARTED = STATUS_CONFIGURED | VIRTIO_CONFIG_S_DRIVER_OK

#: Types of which an image may have more than one part.
REPEATED_PARTS = frozenset({PartType.VQ_CFG, PartType.VQ_POSITION, PartType.DEVICE_STATE})
OPTIONAL_PARTS = frozenset({PartType.DEV_FEATURES, PartType.DEVICE_STATUS})
REQUIRED_PARTS = frozenset({PartType.IDENTITY, PartType.DRV_FEATURES, PartType.END})
#: The size of a value in bytes, for the types whose values all have one size.
PART_SIZES = {
    PartType.IDENTITY: IDENTITY.size_bytes,
    PartType.DEV_FEATURES: 8,
    PartType.DRV_FEATURES: 8,
    PartType.DEVICE_STATUS: 1,
    PartType.VQ_CFG: VQ_CFG.size_bytes,
    PartType.VQ_POSITION: VQ_POSITION.size_bytes,
}
