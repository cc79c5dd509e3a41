"""The driver's side of a split ring, against a device's side in the same memory."""

import os

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists

from vdpabridge.errors import DeadlineExceeded
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import RingError, SplitQueue
from vdpabridge.linux.deadline import Deadline

from ..support.blk_device import BlockDevice


@pytest.fixture
def ring():
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 8) as queue:
        yield memory, queue


def test_layout_follows_the_standard(ring):
    _, queue = ring
    setup = queue.setup
    assert setup.size == 8
    assert setup.desc_address % 16 == 0
    assert setup.avail_address % 2 == 0
    assert setup.used_address % 4 == 0
    assert setup.avail_address >= setup.desc_address + 8 * 16
    assert setup.used_address >= setup.avail_address + 6 + 2 * 8


def test_bytes_of_one_chain(ring):
    memory, queue = ring
    head = queue.add([(0x1111, 0x22)], [(0x3333, 0x44)])
    setup = queue.setup
    first = bytes(memory.slice(setup.desc_address + 16 * head, 16))
    following = int.from_bytes(first[14:], "little")
    assert first.hex() == "1111000000000000" + "22000000" + "0100" + first[14:].hex()
    assert (
        bytes(memory.slice(setup.desc_address + 16 * following, 16)).hex()
        == "3333000000000000" + "44000000" + "0200" + "0000"
    )
    assert bytes(memory.slice(setup.avail_address, 6)) == bytes([0, 0, 1, 0]) + head.to_bytes(2, "little")


@pytest.mark.parametrize("size", [0, 3, 0x10000, -8])
def test_sizes_that_no_ring_has(size):
    with GuestMemory(1 << 16) as memory, pytest.raises(ValueError, match="power of two"):
        SplitQueue(memory, size)


def test_a_full_ring_takes_no_more(ring):
    _, queue = ring
    for _ in range(4):
        queue.add([(0, 1)], [(1, 1)])
    assert queue.free == 0
    with pytest.raises(ValueError, match="a chain of 1 descriptors, and 0 are free"):
        queue.add([(0, 1)])
    with pytest.raises(ValueError, match="a chain of 0"):
        queue.add([])


def test_a_device_beside_us_never_sees_half_an_index(ring):
    """Another process reads the available index all the while: it only ever goes up."""
    memory, queue = ring
    setup = queue.setup
    data = memory.allocate(64)
    reader = os.fork()
    if reader == 0:
        words = memory.slice(setup.avail_address, 4).cast("H")
        last, torn = 0, 0
        while last < 3000:
            index = words[1]
            torn |= index < last
            last = max(last, index)
        os._exit(torn)
    device = BlockDevice(memory, queue)
    for _ in range(3000):
        queue.add([(data, 16)], [(data + 32, 1)])
        device.process()
        list(queue.used())
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0


def test_kick_and_wait(ring):
    _, queue = ring
    queue.kick()
    assert os.eventfd_read(queue.kick_fd) == 1
    with pytest.raises(DeadlineExceeded, match="no call; 0 chains pending"):
        queue.wait(Deadline(0.01))
    os.eventfd_write(queue.call_fd, 3)
    queue.wait(Deadline(1))


@pytest.mark.parametrize("fault", ["twice", "made up"])
def test_a_device_that_breaks_the_rules_is_caught(ring, fault):
    memory, queue = ring
    device = BlockDevice(memory, queue)
    data = memory.allocate(64)
    queue.add([(data, 16)], [(data + 32, 1)])
    device.fault = fault
    device.process()
    with pytest.raises(RingError, match="which the device does not have"):
        list(queue.used())


@settings(max_examples=30, deadline=None)
@given(lists(integers(1, 4), min_size=1, max_size=60), integers(0, 0xFFFF))
def test_descriptors_come_back(lengths, start):
    """Chains of any length, around any index: what the device used can be used again."""
    with GuestMemory(1 << 18) as memory, SplitQueue(memory, 16) as queue:
        queue.avail_index = queue.used_index = start
        for area in (queue.setup.avail_address, queue.setup.used_address):
            memory.slice(area + 2, 2)[:] = start.to_bytes(2, "little")
        device = BlockDevice(memory, queue)
        data = memory.allocate(64)
        for length in lengths:
            if queue.free < length + 1:
                device.process()
                assert all(written == 1 for _, written in queue.used())
            queue.add([(data, 16)] * length, [(data + 32, 1)])
        device.process()
        assert len(list(queue.used())) + 0 == queue.pending or queue.pending == 0
        assert queue.free == 16
        assert queue.avail_index == queue.used_index == (start + len(lengths)) & 0xFFFF


def test_repr(ring):
    _, queue = ring
    queue.add([(0, 1)])
    assert repr(queue) == "<SplitQueue of 8: available 1, used 0, 1 pending>"
