"""Carries a device's own state: from a device into an image, from a spool into a device, from one to another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ...abi.state_image import PART_VALUE_BYTES_MAX
from ...device import Device, StateDirection, StatePhase
from ...errors import DeadlineExceeded, VdpaBridgeError
from ...linux.mappings import memory_file
from ..image.reader import ImageReader
from ..image.writer import ImageWriter
from ..report import Report
from .channel import READ_AND_WRITE, ChannelError, Limits, copy, enlarge, read_some, write_all

__all__ = ["carry_state", "keep_state", "read_state", "spool_state", "write_state"]

#: What is spooled in memory; more goes to a file without a name.
_SPOOL_BYTES = 16 << 20


def read_state(device: Device, writer: ImageWriter, limits: Limits, report: Report) -> None:
    """Write the device's state into the image, piece by piece. Hashing takes the bytes through this process, once."""
    report.copied_by = READ_AND_WRITE
    fd = _save_fd(device)
    try:
        enlarge(fd)
        # two: one is filled while the other is hashed
        buffer, other = (memoryview(bytearray(PART_VALUE_BYTES_MAX)) for _ in range(2))
        filled = 0
        while count := read_some(fd, buffer[filled:], limits):
            report.state_bytes += count
            limits.check(report.state_bytes)
            filled += count
            # full parts, so that equal state makes equal images, whatever pieces came
            if filled == len(buffer):
                writer.state(buffer)
                buffer, other, filled = other, buffer, 0
        writer.state(buffer[:filled])
    finally:
        os.close(fd)


def write_state(device: Device, spool: int, limits: Limits, report: Report) -> None:
    """Write the state in ``spool`` (borrowed) into ``device``; `Device.check_state` tells whether that succeeded."""
    fd = _load_fd(device)
    try:
        enlarge(fd)
        os.lseek(spool, 0, os.SEEK_SET)
        with _own_words(device):
            report.copied_by = copy(spool, fd, limits).copied_by
    finally:
        os.close(fd)


def carry_state(source: Device, destination: Device, limits: Limits, report: Report) -> None:
    """Carry device state from one device to the other, through the kernel alone if it can."""
    reader = _save_fd(source)
    try:
        writer = _load_fd(destination)
        try:
            enlarge(reader)
            enlarge(writer)
            with _own_words(destination):
                report.state_bytes, report.copied_by = copy(reader, writer, limits)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


@contextmanager
def _own_words(device: Device) -> Iterator[None]:
    """The body writes into ``device``. If the device stops reading, it is asked why: a broken pipe does not say."""
    try:
        yield
    except ChannelError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            device.check_state()
        raise


def spool_state(reader: ImageReader, limits: Limits, report: Report) -> int:
    """The device's state from an image, verified, in a file of its own that the caller owns."""

    def pieces() -> Iterator[bytes | memoryview]:
        for piece in reader.state():
            report.state_bytes += len(piece)
            limits.check(report.state_bytes)
            yield piece

    return _spool(pieces(), limits)


def keep_state(device: Device, limits: Limits) -> int:
    """The state of a stopped ``device``, whole, in a file owned by the caller, for `write_state` to give it back."""
    fd = _save_fd(device)
    try:
        enlarge(fd)
        spool = _spool(_pieces(fd, limits), limits)
    finally:
        os.close(fd)
    try:
        device.check_state()
    except BaseException:
        os.close(spool)
        raise
    return spool


def _pieces(fd: int, limits: Limits) -> Iterator[memoryview]:
    """What comes out of ``fd`` (borrowed) until its end; each is valid until the next."""
    buffer = memoryview(bytearray(PART_VALUE_BYTES_MAX))
    done = 0
    while count := read_some(fd, buffer, limits):
        done += count
        limits.check(done)
        yield buffer[:count]


def _spool(pieces: Iterable[bytes | memoryview], limits: Limits) -> int:
    """``pieces`` in a file owned by the caller: in memory, or on disk if they are many."""
    spool = memory_file("vdpabridge-spool", 0)
    in_memory, size_bytes = True, 0
    try:
        for piece in pieces:
            size_bytes += len(piece)
            if in_memory and size_bytes > _SPOOL_BYTES:
                on_disk = _to_disk(spool, limits)
                os.close(spool)
                spool, in_memory = on_disk, False
            write_all(spool, piece, limits)
    except BaseException:
        os.close(spool)
        raise
    return spool


def _to_disk(spool: int, limits: Limits) -> int:
    """What is in ``spool`` (borrowed), in a file without a name that the caller owns."""
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            os.lseek(spool, 0, os.SEEK_SET)
            copy(spool, file.fileno(), limits)
            return os.dup(file.fileno())
    except DeadlineExceeded:
        raise
    except OSError as error:
        why, hint = os.strerror(error.errno or 0), "the environment variable TMPDIR says where"
        raise VdpaBridgeError("spool the state", why=why, hint=hint) from error


def _save_fd(device: Device) -> int:
    """The end to read ``device``'s state from, owned by the caller."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        instead = _begin(device, StateDirection.SAVE, writer)
    except BaseException:
        os.close(reader)
        raise
    return _other(reader, instead)


def _load_fd(device: Device) -> int:
    """The end to write ``device``'s state to, owned by the caller."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        instead = _begin(device, StateDirection.LOAD, reader)
    except BaseException:
        os.close(writer)
        raise
    return _other(writer, instead)


def _begin(device: Device, direction: StateDirection, fd: int) -> int | None:
    """Begin a transfer through ``fd``; takes ownership of it."""
    try:
        return device.set_state_fd(direction, StatePhase.STOPPED, os.dup(fd))
    finally:
        os.close(fd)


def _other(ours: int, instead: int | None) -> int:
    """The device's own descriptor if it gave one (``ours`` is closed then), otherwise ``ours``."""
    if instead is not None:
        os.close(ours)
        return instead
    return ours
