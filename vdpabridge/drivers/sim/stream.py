"""The simulator's state as a stream: the reader notices if it was cut, changed or mixed up, before anything is used.

``magic[8] version:u32 device_id:u32``, then chunks of ``length:u32 data``, a length of 0, and the SHA-256 of everything
before it. Little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator

from .model import StateRefused

__all__ = ["CHUNK_BYTES_MAX", "STREAM_VERSION", "decode", "encode"]

STREAM_VERSION = 2
CHUNK_BYTES_MAX = 1 << 20
_MAGIC = b"vdpa-sim"
_HEAD = struct.Struct("<8sII")
_LENGTH = struct.Struct("<I")


def encode(device_id: int, chunks: Iterable[bytes], *, version: int = STREAM_VERSION) -> Iterator[bytes]:
    """The stream of ``chunks``, none of which is empty or longer than `CHUNK_BYTES_MAX`."""
    digest = hashlib.sha256()
    pieces = [_HEAD.pack(_MAGIC, version, device_id)]
    for chunk in chunks:
        pieces += [_LENGTH.pack(len(chunk)), chunk]
        for piece in pieces:
            digest.update(piece)
        yield from pieces
        pieces = []
    pieces.append(_LENGTH.pack(0))
    for piece in pieces:
        digest.update(piece)
    yield from pieces
    yield digest.digest()


def decode(device_id: int, read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The chunks of a stream. ``read`` gives as many bytes as asked for, fewer only at the end.

    Raises `StateRefused`, at the latest after the last chunk: the state is whole only if the caller reaches the end.
    """
    digest = hashlib.sha256()

    def take(size: int) -> bytes:
        data = read(size)
        if len(data) < size:
            raise StateRefused("it ends in the middle")
        digest.update(data)
        return data

    magic, version, its_device_id = _HEAD.unpack(take(_HEAD.size))
    if magic != _MAGIC:
        raise StateRefused("it is not a simulator's")
    if version != STREAM_VERSION:
        raise StateRefused(f"it is of version {version}, and this is version {STREAM_VERSION}")
    if its_device_id != device_id:
        raise StateRefused(f"it is of device id {its_device_id}, and this is {device_id}")
    while length := _LENGTH.unpack(take(_LENGTH.size))[0]:
        if length > CHUNK_BYTES_MAX:
            raise StateRefused(f"a chunk of {length} bytes")
        yield take(length)
    expected = digest.digest()
    if take(len(expected)) != expected:
        raise StateRefused("its checksum is wrong")
    if read(1):
        raise StateRefused("something follows its end")
