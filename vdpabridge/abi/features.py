"""Names of virtio feature bits, for people and for JSON."""

from __future__ import annotations

from types import ModuleType

from . import virtio, virtio_blk, virtio_net, virtio_ring

__all__ = ["COMMON_FEATURES", "DEVICE_FEATURES", "feature_names"]


def _bits(module: ModuleType, prefix: str) -> dict[int, str]:
    names = {name: value for name, value in vars(module).items() if name.startswith(prefix)}
    return {value: name.removeprefix(prefix) for name, value in reversed(names.items())}


#: Bit -> name, of the bits that mean the same for every device. ANY_LAYOUT keeps its name from virtio 0.9.
COMMON_FEATURES = _bits(virtio, "VIRTIO_F_") | _bits(virtio_ring, "VIRTIO_RING_F_")

#: Device id -> bit -> name, of the bits that belong to one kind of device.
DEVICE_FEATURES = {
    virtio.VIRTIO_ID_NET: _bits(virtio_net, "VIRTIO_NET_F_"),
    virtio.VIRTIO_ID_BLOCK: _bits(virtio_blk, "VIRTIO_BLK_F_"),
}


def feature_names(features: int, device_id: int | None = None) -> list[str]:
    """The names of the set bits, lowest first; ``bit_N`` for a bit without a name, as iproute2 writes it."""
    names = COMMON_FEATURES | DEVICE_FEATURES.get(device_id or 0, {})
    return [names.get(bit, f"bit_{bit}") for bit in range(features.bit_length()) if features >> bit & 1]
