"""Memory: what can be mapped, what is refused and with which words, what a reset leaves."""

import errno
import mmap
import os
import resource
from contextlib import contextmanager

import pytest

from vdpabridge.device import MemoryRegion, RunState
from vdpabridge.drivers.vhost_vdpa import MappingError, VhostVdpa
from vdpabridge.errors import KernelError
from vdpabridge.memory import GuestMemory, SharedMapping
from vdpabridge.workload.block import BlockDriver, KnownDisk

from ..support.release import RELEASE

PAGE = mmap.PAGESIZE
#: vdpa_sim maps by address from 6.4 on; before, it pins pages as hardware does, and they count as locked memory.
PINS = RELEASE < (6, 4)


@pytest.fixture
def device(block_node):
    with VhostVdpa.open(block_node) as opened:
        yield opened


def test_private_memory_is_refused_before_the_kernel_takes_it_and_maps_nothing(device):
    from vdpabridge._libc import ffi

    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with pytest.raises(MappingError, match=r"private or unmapped memory: only shared"):
        device.iotlb.update(0, 4 * PAGE, int(ffi.cast("uintptr_t", ffi.from_buffer(memory))))


def test_a_hole_is_refused(device):
    with GuestMemory(2 * PAGE) as memory, pytest.raises(MappingError, match="private or unmapped"):
        device.iotlb.update(0, 64 * PAGE, memory.mapping.address)


def test_overlap_names_what_is_in_the_way(device):
    with GuestMemory(4 * PAGE, guest_address=0x10000) as memory:
        device.map([memory.region])
        with pytest.raises(MappingError, match="overlaps what is mapped at 0x10000"):
            device.map([MemoryRegion(0x11000, PAGE, memory.fileno())])
        # the refused region changed nothing
        device.unmap([memory.region])
        device.map([memory.region])


def test_page_offsets_must_agree(device):
    with GuestMemory(4 * PAGE) as memory, pytest.raises(MappingError, match="offset within a page"):
        device.iotlb.update(0x10008, PAGE, memory.mapping.address)


def test_a_file_shorter_than_the_region_is_refused(device):
    with GuestMemory(PAGE) as memory, pytest.raises(MappingError, match="only 4096 bytes"):
        device.map([MemoryRegion(0, 2 * PAGE, memory.fileno())])


def test_all_or_none(device):
    """The second of two regions is refused: the first is gone again, its mapping in this process too."""
    with GuestMemory(4 * PAGE) as memory:
        good = MemoryRegion(0x10000, PAGE, memory.fileno())
        with pytest.raises(MappingError):
            device.map([good, MemoryRegion(0x10000, PAGE, memory.fileno())])
        assert device.regions == []
        assert device.iotlb.entries == {}
        device.map([good])


def test_unmapping_what_is_not_mapped(device):
    with GuestMemory(PAGE) as memory, pytest.raises(ValueError, match="nothing of 4096 bytes is mapped"):
        device.unmap([memory.region])


@contextmanager
def memlock(limit_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_locked_memory_limit_is_named(device):
    """Root has no exemption where pages are pinned; where they are not, no limit applies."""
    with GuestMemory(64 * PAGE) as memory, memlock(8 * PAGE):
        if PINS:
            with pytest.raises(
                KernelError, match=rf"locked memory: {64 * PAGE} bytes needed, the limit is {8 * PAGE}"
            ) as caught:
                device.map([memory.region])
            assert caught.value.errno == errno.EFAULT
        else:
            device.map([memory.region])


def test_many_regions_in_one_batch(device):
    with GuestMemory(256 * PAGE) as memory:
        regions = [MemoryRegion(0x100000 + 2 * PAGE * n, PAGE, memory.fileno(), n * PAGE) for n in range(256)]
        device.map(regions)
        assert len(device.iotlb.entries) == 256
        device.unmap(regions[::2])
        assert len(device.iotlb.entries) == 128
        device.unmap(regions[1::2])


def test_read_only_memory_is_read(device):
    """The device reads requests from memory that it may not write; its writes there go nowhere."""
    with GuestMemory(4 * PAGE) as memory:
        fd = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY)
        device.map([MemoryRegion(0x10000, 4 * PAGE, fd, writable=False)])
        os.close(fd)


def test_memory_stays_mapped_through_resets(bench):
    """With IOTLB_PERSIST (6.7) by itself, without it because the driver maps again."""
    for _ in range(3):
        disk = KnownDisk(BlockDriver(bench.memory, bench.queue))
        bench.reach(RunState.RUNNING)
        disk.write(7)
        disk.settle(disk.driver.drain())
        assert disk.verify() == 1
        bench.device.reset()


def test_without_iotlb_persist_too(block_node):
    """A device that forgets its mappings at a reset, as most hardware parents do."""
    wanted = 0b1111110  # everything up to ENABLE_AFTER_DRIVER_OK
    with GuestMemory(1 << 20) as memory, VhostVdpa.open(block_node, backend_features=wanted) as device:
        assert not device.backend_features >> 8 & 1
        device.map([memory.region])
        from vdpabridge.virtqueue import SplitQueue

        with SplitQueue(memory, 64) as queue:
            for _ in range(2):
                disk = KnownDisk(BlockDriver(memory, queue))
                device.accept_features(1 << 32)
                queue.attach(device, 0, queue.avail_index)
                device.start()
                disk.write(3)
                disk.settle(disk.driver.drain())
                device.reset()


def test_doorbell_is_refused_with_the_kernels_524(device):
    with pytest.raises(KernelError, match="ENOTSUPP: no doorbell page") as caught:
        device.map_doorbell(0)
    assert caught.value.errno == 524


def test_mapping_outlives_its_descriptor():
    with GuestMemory(PAGE) as memory:
        fd = os.dup(memory.fileno())
        mapping = SharedMapping(fd, PAGE)
        os.close(fd)
        mapping.view[0] = 7
        assert memory.view[0] == 7
        mapping.close()
        mapping.close()
