"""Where a virtqueue stands: the 32-bit word of VHOST_GET/SET_VRING_BASE, which vhost-user uses too.

Source: drivers/vhost/vhost.c and vdpa.c (vhost_vdpa_vring_ioctl), vhost-user.rst "Vring descriptor indices".
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PackedBase", "QueueBase", "SplitBase", "decode_base"]

_INDEX_15 = 0x7FFF


@dataclass(frozen=True, slots=True)
class SplitBase:
    """A split ring: the next available index the device will look at, free running modulo 2^16."""

    avail_index: int = 0

    def encode(self) -> int:
        """The word; ValueError if the index does not fit."""
        if not 0 <= self.avail_index <= 0xFFFF:
            raise ValueError(f"split ring index {self.avail_index} does not fit 16 bits")
        return self.avail_index


@dataclass(frozen=True, slots=True)
class PackedBase:
    """A packed ring: next available and next used descriptor, each with its wrap counter."""

    avail_index: int = 0
    avail_wrap: bool = True
    used_index: int = 0
    used_wrap: bool = True

    def encode(self) -> int:
        """The word: available half below, used half above; ValueError if an index does not fit."""
        for index in (self.avail_index, self.used_index):
            if not 0 <= index <= _INDEX_15:
                raise ValueError(f"packed ring index {index} does not fit 15 bits")
        return self.avail_index | self.avail_wrap << 15 | self.used_index << 16 | self.used_wrap << 31


QueueBase = SplitBase | PackedBase


def decode_base(word: int, *, packed: bool) -> QueueBase:
    """The base that ``word`` stands for. ``packed``: VIRTIO_F_RING_PACKED was accepted.

    The upper half of a split ring's word is not an index; it is dropped.
    """
    if not packed:
        return SplitBase(word & 0xFFFF)
    return PackedBase(word & _INDEX_15, bool(word >> 15 & 1), word >> 16 & _INDEX_15, bool(word >> 31 & 1))
