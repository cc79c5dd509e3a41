"""What every device refuses, whichever driver it has."""

import os

import pytest

from vdpabridge.device import MemoryRegion
from vdpabridge.device.checks import (
    check_address_space,
    check_config_range,
    check_mapped,
    check_queue,
    check_regions,
    overlap,
)


def region(address, size, space=0):
    return MemoryRegion(address, size, -1, address_space=space)


@pytest.mark.parametrize(
    ("spans", "found"),
    [
        ([], None),
        ([(0, 10)], None),
        ([(0, 10), (10, 5)], None),
        ([(10, 5), (0, 10)], None),
        ([(0, 10), (9, 1)], (0, 9)),
        ([(9, 1), (0, 10)], (0, 9)),
        ([(4, 2), (4, 2)], (4, 4)),
        ([(0, 100), (200, 1), (50, 1)], (0, 50)),
    ],
)
def test_overlap(spans, found):
    assert overlap(spans) == found


MAPPED = [region(0x1000, 0x1000), region(0x8000, 0x1000, space=1)]


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ([region(0x1800, 0x1000)], "the region at 0x1800 overlaps the one at 0x1000: unmap that first"),
        ([region(0, 0x1001)], "the region at 0x1000 overlaps the one at 0x0: unmap that first"),
        ([region(0x3000, 16), region(0x3008, 16)], "the region at 0x3008 overlaps the one at 0x3000: unmap that first"),
        ([region(0x8FFF, 1, space=1)], "the region at 0x8fff overlaps the one at 0x8000: unmap that first"),
        ([region(0x3000, 16, space=2)], "no address space 2: the device has 2, numbered from 0"),
        ([region(0x3000, 16, space=-1)], "no address space -1: the device has 2, numbered from 0"),
        ([region(0x3000, 0)], "0 bytes at 0x3000 cannot be mapped"),
        ([region(0x3000, -1)], "-1 bytes at 0x3000 cannot be mapped"),
        ([region((1 << 64) - 1, 2)], "2 bytes at 0xffffffffffffffff cannot be mapped"),
    ],
)
def test_regions_that_cannot_be_mapped(regions, words):
    with pytest.raises(ValueError, match=f"^dev: {words}$"):
        check_regions("dev", regions, MAPPED, 2)


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [region(0x2000, 0x1000), region(0, 0x1000)],
        [region(0x1000, 0x1000, space=1), region(0x8000, 0x1000)],
        [region((1 << 64) - 1, 1)],
    ],
)
def test_regions_that_can_be_mapped(regions):
    check_regions("dev", regions, MAPPED, 2)


def test_what_is_mapped_is_found_by_address_size_and_space():
    assert check_mapped("dev", [region(0x8000, 0x1000, space=1)], MAPPED) == [MAPPED[1]]
    for wrong in (region(0x1000, 0x800), region(0x1001, 0x1000), region(0x1000, 0x1000, space=1)):
        with pytest.raises(ValueError, match=r"^dev: no region of "):
            check_mapped("dev", [wrong], MAPPED)
    with pytest.raises(ValueError, match=r"^dev: a region is named twice$"):
        check_mapped("dev", [MAPPED[0], MAPPED[0]], MAPPED)


def test_numbers_begin_at_zero():
    check_queue("dev", 1, 2)
    check_address_space("dev", 0, 1)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"^dev: no queue {index}: the device has 2, numbered from 0$"):
            check_queue("dev", index, 2)


def test_configuration_space_has_an_end():
    check_config_range("dev", 4, 4, 8)
    for offset, size in ((-1, 2), (0, 0), (4, 5), (8, 1)):
        with pytest.raises(
            ValueError, match=f"^dev: {size} bytes at {offset} are outside the configuration space of 8"
        ):
            check_config_range("dev", offset, size, 8)


def test_every_driver_asks(bench_device):
    """The waist refuses before the driver hears of it."""
    device, file = bench_device
    device.map([MemoryRegion(0x10000, 4096, file)])
    for wrong in (MemoryRegion(0x10800, 4096, file), MemoryRegion(0, 4096, file, address_space=1)):
        with pytest.raises(ValueError, match=r"overlaps|no address space 1"):
            device.map([wrong])
    assert [each.guest_address for each in device.regions] == [0x10000]


@pytest.fixture
def bench_device():
    from vdpabridge.drivers.opening import open_device

    file = os.memfd_create("guest")
    os.ftruncate(file, 1 << 20)
    with open_device("sim:blk") as device:
        yield device, file
    os.close(file)
