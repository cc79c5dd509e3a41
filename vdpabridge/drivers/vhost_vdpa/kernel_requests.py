"""vhost-vdpa's requests with Python's arguments: packing and unpacking, one call each, no policy."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ...abi.vhost import (
    VHOST_FILE_UNBIND,
    VHOST_VDPA_CONFIG,
    VHOST_VDPA_IOVA_RANGE,
    VHOST_VRING_ADDR,
    VHOST_VRING_FILE,
    VHOST_VRING_STATE,
    VhostIoctl as Ioctl,
)
from ...device import QueueSetup
from .node import Node

__all__ = ["KernelRequests"]

#: The most of the configuration space in one request: with a larger ioctl buffer, Python would not let other threads
#: run meanwhile, nor would a deadline work.
_CONFIG_CHUNK_BYTES = 1016


class KernelRequests:
    """The requests of an open ``node`` (borrowed). Each raises as `Node.call` does."""

    def __init__(self, node: Node) -> None:
        self.call = node.call

    def get(self, request: Ioctl) -> int:
        """The one number that ``request`` answers."""
        code = _number_in(request)
        buffer = bytearray(code.size)
        self.call(request, buffer)
        value: int = code.unpack(buffer)[0]
        return value

    def set(self, request: Ioctl, value: int) -> None:
        """Make a ``request`` that carries one number."""
        self.call(request, bytearray(_number_in(request).pack(value)))

    def get_of_queue(self, request: Ioctl, index: int) -> int:
        """The number that ``request`` answers for queue ``index``."""
        buffer = VHOST_VRING_STATE.buffer(index, 0)
        self.call(request, buffer, index)
        value: int = VHOST_VRING_STATE.unpack(buffer)[1]
        return value

    def set_of_queue(self, request: Ioctl, index: int, value: int) -> None:
        """Make a ``request`` that carries a number for queue ``index``."""
        self.call(request, VHOST_VRING_STATE.buffer(index, value), index)

    def set_addresses(self, index: int, setup: QueueSetup) -> None:
        """VHOST_SET_VRING_ADDR; in the structure used comes before avail."""
        addresses = (setup.desc_address, setup.used_address, setup.avail_address)
        self.call(Ioctl.VHOST_SET_VRING_ADDR, VHOST_VRING_ADDR.buffer(index, 0, *addresses, 0), index)

    def set_eventfd(self, request: Ioctl, index: int, eventfd: int | None) -> None:
        """Have queue ``index`` use ``eventfd`` (borrowed), or none."""
        fd = VHOST_FILE_UNBIND if eventfd is None else eventfd
        self.call(request, VHOST_VRING_FILE.buffer(index, fd), index)

    def iova_range(self) -> tuple[int, int]:
        """First and last IOVA that can be mapped."""
        buffer = VHOST_VDPA_IOVA_RANGE.buffer(0, 0)
        self.call(Ioctl.VHOST_VDPA_GET_IOVA_RANGE, buffer)
        first, last = VHOST_VDPA_IOVA_RANGE.unpack(buffer)
        return first, last

    def read_config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space."""
        pieces = []
        for start, length in _chunks(offset, size):
            buffer = VHOST_VDPA_CONFIG.buffer(start, length) + bytearray(length)
            self.call(Ioctl.VHOST_VDPA_GET_CONFIG, buffer)
            pieces.append(buffer[VHOST_VDPA_CONFIG.size_bytes :])
        return b"".join(pieces)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write into the configuration space."""
        for start, length in _chunks(offset, len(data)):
            piece = data[start - offset : start - offset + length]
            self.call(Ioctl.VHOST_VDPA_SET_CONFIG, VHOST_VDPA_CONFIG.buffer(start, length) + bytearray(piece))


def _number_in(request: Ioctl) -> struct.Struct:
    if request.carries is None:
        raise ValueError(f"{request.name} carries nothing")
    return request.carries


def _chunks(offset: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(offset, offset + size, _CONFIG_CHUNK_BYTES):
        yield start, min(_CONFIG_CHUNK_BYTES, offset + size - start)
