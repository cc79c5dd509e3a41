"""Chains of descriptors: what a guest's driver has put into a ring, checked at every step.

Source: VIRTIO 1.4 sections 2.7.5 and 2.7.5.3.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..abi.virtio_ring import VRING_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT
from .guest_view import BadAddress, GuestView

__all__ = ["RingBroken", "descriptors"]

#: The most that one chain may have. A guest's driver that asks for more is hostile: indirect tables can name the same
#: memory again and again. Linux stays within the ring's size; QEMU allows 1024 descriptors as well.
CHAIN_DESCRIPTORS_MAX = 1024


class RingBroken(Exception):
    """The guest's driver broke the rules of the ring; no more is processed."""


def descriptors(guest: GuestView, table: memoryview, head: int) -> Iterator[tuple[int, int, int]]:
    """(guest address, size in bytes, flags) of each buffer of the chain that begins with ``head`` of ``table``.

    Raises `RingBroken`.
    """
    for count, descriptor in enumerate(_chain(guest, table, head, inner=False), 1):
        if count > CHAIN_DESCRIPTORS_MAX:
            raise RingBroken(f"a chain of more than {CHAIN_DESCRIPTORS_MAX} descriptors")
        yield descriptor


def _chain(guest: GuestView, table: memoryview, index: int, *, inner: bool) -> Iterator[tuple[int, int, int]]:
    count = len(table) // VRING_DESC.size_bytes
    for _ in range(count):
        if index >= count:
            raise RingBroken(f"descriptor {index} of a table of {count}")
        address, size, flags, following = VRING_DESC.struct.unpack_from(table, index * VRING_DESC.size_bytes)
        if flags & VRING_DESC_F_INDIRECT:
            if inner or flags & VRING_DESC_F_NEXT or not size or size % VRING_DESC.size_bytes:
                raise RingBroken(f"an indirect table of {size} bytes, flags {flags:#x}")
            yield from _chain(guest, _table(guest, address, size), 0, inner=True)
        else:
            yield address, size, flags
        if not flags & VRING_DESC_F_NEXT:
            return
        index = following
    raise RingBroken("a chain of descriptors that has no end")


def _table(guest: GuestView, address: int, size_bytes: int) -> memoryview:
    try:
        return guest.slice(address, size_bytes)
    except BadAddress as error:
        raise RingBroken(f"an indirect table: {error}") from None
