"""Checks for what no device can do, whichever driver it has; they raise the same ValueError for all devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from .values import MemoryRegion

__all__ = ["check_address_space", "check_config_range", "check_mapped", "check_queue", "check_regions", "overlap"]

_ADDRESSES = 1 << 64


def overlap(spans: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """The starts of two of ``spans`` (start, size in bytes) that have bytes in common; None if no two do."""
    for (start, size), (following, _) in pairwise(sorted(spans)):
        if following < start + size:
            return start, following
    return None


def check_regions(
    device: str, regions: Sequence[MemoryRegion], mapped: Sequence[MemoryRegion], address_space_count: int
) -> None:
    """Raise ValueError unless ``regions`` can be mapped beside those that are ``mapped``."""
    for region in regions:
        check_address_space(device, region.address_space, address_space_count)
        if not 0 <= region.guest_address < region.guest_address + region.size_bytes <= _ADDRESSES:
            raise ValueError(f"{device}: {region.size_bytes} bytes at {region.guest_address:#x} cannot be mapped")
    for space in {region.address_space for region in regions}:
        spans = [(each.guest_address, each.size_bytes) for each in (*mapped, *regions) if each.address_space == space]
        if (found := overlap(spans)) is not None:
            raise ValueError(
                f"{device}: the region at {found[1]:#x} overlaps the one at {found[0]:#x}: unmap that first"
            )


def check_mapped(device: str, regions: Sequence[MemoryRegion], mapped: Sequence[MemoryRegion]) -> list[MemoryRegion]:
    """The regions of ``mapped`` that ``regions`` name, by address, size and address space. Raises ValueError."""
    keys = [_key(region) for region in regions]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{device}: a region is named twice")
    known = {_key(region): region for region in mapped}
    for address, size, space in keys:
        if (address, size, space) not in known:
            raise ValueError(f"{device}: no region of {size} bytes is mapped at {address:#x} in address space {space}")
    return [known[key] for key in keys]


def check_address_space(device: str, address_space: int, count: int) -> None:
    """Raise ValueError unless a device with ``count`` address spaces has ``address_space``."""
    if not 0 <= address_space < count:
        raise ValueError(f"{device}: no address space {address_space}: the device has {count}, numbered from 0")


def check_queue(device: str, index: int, count: int) -> None:
    """Raise ValueError unless a device with ``count`` queues has queue ``index``."""
    if not 0 <= index < count:
        raise ValueError(f"{device}: no queue {index}: the device has {count}, numbered from 0")


def check_config_range(device: str, offset: int, size: int, whole: int) -> None:
    """Raise ValueError unless ``size`` bytes at ``offset`` are in a configuration space of ``whole`` bytes."""
    if offset < 0 or size <= 0 or offset + size > whole:
        raise ValueError(f"{device}: {size} bytes at {offset} are outside the configuration space of {whole} bytes")


def _key(region: MemoryRegion) -> tuple[int, int, int]:
    return region.guest_address, region.size_bytes, region.address_space
