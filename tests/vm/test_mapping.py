"""Memory: what can be mapped, what is refused and with which words, what a reset leaves."""

import errno
import mmap
import os
import resource
from contextlib import contextmanager

import pytest

from vdpabridge.abi.virtio_blk import VIRTIO_BLK_OUTHDR, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from vdpabridge.device import MemoryRegion, RunState
from vdpabridge.drivers.vhost_vdpa import MappingError, VhostVdpa
from vdpabridge.errors import KernelError
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.deadline import Deadline
from vdpabridge.linux.mappings import SharedMapping

from .conftest import PINS

PAGE = mmap.PAGESIZE


@pytest.fixture
def device(block_node):
    with VhostVdpa.open(block_node) as opened:
        yield opened


def test_private_memory_is_refused_before_the_kernel_takes_it_and_maps_nothing(device):
    from vdpabridge.linux._libc import ffi

    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with pytest.raises(MappingError, match=r"private, read-only or unmapped memory: only shared"):
        device.iotlb.update(0, 4 * PAGE, int(ffi.cast("uintptr_t", ffi.from_buffer(memory))))


def test_a_hole_is_refused(device):
    with GuestMemory(2 * PAGE) as memory, pytest.raises(MappingError, match="unmapped memory"):
        device.iotlb.update(0, 64 * PAGE, memory.mapping.address)


def test_overlap_names_what_is_in_the_way(device):
    with GuestMemory(4 * PAGE, guest_address=0x10000) as memory:
        device.map([memory.region])
        with pytest.raises(ValueError, match="0x11000 overlaps the one at 0x10000"):
            device.map([MemoryRegion(0x11000, PAGE, memory.fileno())])
        # the refused region changed nothing
        device.unmap([memory.region])
        device.map([memory.region])


def test_page_offsets_must_agree(device):
    with GuestMemory(4 * PAGE) as memory, pytest.raises(MappingError, match="offset within a page"):
        device.iotlb.update(0x10008, PAGE, memory.mapping.address)


def test_a_file_shorter_than_the_region_is_refused(device):
    with GuestMemory(PAGE) as memory, pytest.raises(MappingError, match="of a file of 4096 bytes"):
        device.map([MemoryRegion(0, 2 * PAGE, memory.fileno())])


def test_all_or_none(device):
    """The second of two regions is refused: the first is gone again, its mapping in this process too."""
    with GuestMemory(4 * PAGE) as memory:
        good = MemoryRegion(0x10000, PAGE, memory.fileno())
        with pytest.raises(MappingError):
            device.map([good, MemoryRegion(0x20000, 8 * PAGE, memory.fileno())])
        assert device.regions == []
        assert device.iotlb.entries == {}
        device.map([good])


def test_unmapping_what_is_not_mapped(device):
    with GuestMemory(PAGE) as memory, pytest.raises(ValueError, match="no region of 4096 bytes is mapped"):
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
                KernelError, match=f"if pages are pinned: {64 * PAGE} bytes needed, limit {8 * PAGE}"
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


def test_a_read_only_descriptor_is_refused(device):
    """The kernel takes a shared mapping of one for private: it would answer success and map nothing."""
    with GuestMemory(4 * PAGE) as memory:
        fd = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY)
        with pytest.raises(MappingError, match="not open for reading and writing"):
            device.map([MemoryRegion(0x10000, 4 * PAGE, fd, writable=False)])
        with (
            SharedMapping(fd, 4 * PAGE, protection=mmap.PROT_READ) as mapping,
            pytest.raises(MappingError, match="read-only"),
        ):
            device.iotlb.update(0x10000, 4 * PAGE, mapping.address)
        os.close(fd)


def test_memory_that_the_device_may_only_read(block_node):
    """What is to be written to the disk is in memory that is mapped for reading; rings and answers are not."""
    with GuestMemory(1 << 20) as rings, GuestMemory(1 << 16, guest_address=0x5000_0000) as readable:
        region = readable.region
        with VhostVdpa.open(block_node) as device, SplitQueue(rings, 16) as queue:
            device.map([rings.region, MemoryRegion(region.guest_address, region.size_bytes, region.fd, writable=False)])
            device.accept_features(1 << 32)
            queue.attach(device, 0)
            device.start()
            status, data = rings.allocate(1), rings.allocate(512)
            header, source = readable.allocate(16), readable.allocate(512)
            readable.slice(source, 512)[:] = b"from read-only memory".ljust(512)
            readable.slice(header, 16)[:] = VIRTIO_BLK_OUTHDR.pack(VIRTIO_BLK_T_OUT, 0, 40)
            perform(queue, [(header, 16), (source, 512)], [(status, 1)])
            assert rings.slice(status, 1)[0] == 0
            readable.slice(header, 16)[:] = VIRTIO_BLK_OUTHDR.pack(VIRTIO_BLK_T_IN, 0, 40)
            perform(queue, [(header, 16)], [(data, 512), (status, 1)])
            assert bytes(rings.slice(data, 512)) == bytes(readable.slice(source, 512))


def perform(queue, read, write):
    queue.add(read, write)
    queue.kick()
    deadline = Deadline(5)
    while not list(queue.used()):
        queue.wait(deadline)


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
