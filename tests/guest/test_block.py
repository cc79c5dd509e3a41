"""Block requests and the disk whose every block is known: wrong answers are noticed."""

import pytest

from vdpabridge.guest.block import BLOCK_BYTES, BlockDriver, BlockError, KnownDisk, block_pattern
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import RingError, SplitQueue

from ..support.blk_device import BlockDevice


@pytest.fixture
def disk():
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue:
        known = KnownDisk(BlockDriver(memory, queue))
        yield known, BlockDevice(memory, queue)


def test_write_read_flush_id(disk):
    known, device = disk
    driver = known.driver
    driver.write(3, b"x" * 512)
    driver.flush()
    driver.get_id()
    device.process()
    assert [len(request.data) for request in driver.done()] == [0, 0, 20]
    driver.read(3, 512)
    device.process()
    assert driver.done()[0].data == b"x" * 512


def test_known_blocks_verify(disk):
    known, device = disk
    for block in range(20):
        known.write(block)
    device.process()
    known.settle(known.driver.done())
    assert known.writes_confirmed == 20
    known.read(7)
    device.process()
    known.settle(known.driver.done())
    assert known.reads_verified == 1


def test_a_lost_write_is_noticed(disk):
    known, device = disk
    known.write(5)
    device.process()
    known.settle(known.driver.done())
    known.write(5)
    before = bytes(device.disk)
    device.process()
    device.disk[:] = before
    known.settle(known.driver.done())
    known.read(5)
    device.process()
    with pytest.raises(BlockError, match="expected block 5 generation 2, found block 5 generation 1"):
        known.settle(known.driver.done())


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("status", BlockError, "the device answered IOERR"),
        ("no status", BlockError, "the device answered no status"),
        ("length", BlockError, "the device says that it wrote 2 bytes"),
        ("twice", RingError, "used it twice"),
    ],
)
def test_faults_are_noticed(disk, fault, error, words):
    known, device = disk
    known.write(1)
    device.fault = fault
    device.process()
    with pytest.raises(error, match=words):
        known.driver.done()


def test_what_was_done_beside_a_failure_is_not_lost(disk):
    known, device = disk
    known.write(1)
    known.write(2)
    device.process(1)
    device.fault = "status"
    device.process()
    with pytest.raises(BlockError) as caught:
        known.driver.done()
    assert [request.tag for request in caught.value.finished] == [(1, 1)]
    assert known.driver.inflight == 0


def test_requests_larger_than_the_room_for_them(disk):
    known, _ = disk
    with pytest.raises(ValueError, match="a request of 8192 bytes, and the driver has room for 4096"):
        known.driver.write(0, bytes(8192))
    assert known.driver.queue.free == 64


def test_flushes_settle_as_nothing(disk):
    known, device = disk
    known.driver.flush()
    device.process()
    known.settle(known.driver.done())
    assert known.writes_confirmed == 0


def test_one_request_a_block(disk):
    known, _ = disk
    known.write(1)
    with pytest.raises(ValueError, match="block 1 has a request in flight"):
        known.write(1)


def test_no_more_than_fit(disk):
    known, _ = disk
    for block in range(known.driver.capacity):
        known.write(block)
    with pytest.raises(ValueError, match="no more fit"):
        known.driver.flush()


def test_pattern_tells_block_and_generation():
    assert len(block_pattern(1, 2)) == BLOCK_BYTES
    assert block_pattern(1, 2)[:16] == (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert len({block_pattern(block, generation) for block in range(4) for generation in range(4)}) == 16
