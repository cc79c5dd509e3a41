"""Shared mappings: bits that are set for other processes, and files that are cut under them."""

import errno
import os

import pytest

from vdpabridge.linux.mappings import SharedMapping, atomic_set_bits, memory_file

SIZE_BYTES = 8192
RANGES = [(0, 1), (7, 1), (31, 2), (0, 32), (1, 32), (5, 100), (32, 64), (40, 300), (8 * SIZE_BYTES - 33, 33), (3, 0)]


@pytest.fixture
def mapping():
    fd = memory_file("bits", SIZE_BYTES)
    made = SharedMapping(fd, SIZE_BYTES)
    made.fd = fd
    yield made
    made.close()
    os.close(fd)


@pytest.mark.parametrize(("first", "count"), RANGES)
def test_these_bits_and_no_others(mapping, first, count):
    atomic_set_bits(mapping, first, count)
    wanted = ((1 << count) - 1 << first).to_bytes(SIZE_BYTES, "little")
    assert bytes(mapping.view) == wanted


def test_bits_that_are_set_stay_set(mapping):
    mapping.view[:] = b"\x55" * SIZE_BYTES
    atomic_set_bits(mapping, 33, 64)
    wanted = int.from_bytes(b"\x55" * SIZE_BYTES, "little") | (1 << 64) - 1 << 33
    assert bytes(mapping.view) == wanted.to_bytes(SIZE_BYTES, "little")


@pytest.mark.parametrize("count", [1, 32, 1000])
def test_a_file_that_was_cut_is_an_error_and_not_the_end(mapping, count):
    os.ftruncate(mapping.fd, 4096)
    with pytest.raises(OSError, match="setting bits at 4096") as caught:
        atomic_set_bits(mapping, 8 * 4096, count)
    assert caught.value.errno == errno.EFAULT
