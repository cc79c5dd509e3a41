"""The simulated device: held to the state table like every driver, and what it promises besides."""

import json
import os
import struct
import threading
import time
from contextlib import contextmanager

import pytest

from vdpabridge.device import (
    Capability,
    DirtyLog,
    InflightRegion,
    MemoryRegion,
    RunState,
    SplitBase,
    StateDirection,
    StatePhase,
)
from vdpabridge.drivers.sim import Faults, Sim
from vdpabridge.drivers.sim.stream import encode
from vdpabridge.errors import DeadlineExceeded, DeviceFailed, FeatureError, VdpaBridgeError
from vdpabridge.guest.block import BlockDriver, BlockError, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.mappings import SharedMapping, atomic_set_bits

from ..support.state import load, pump, state_of
from ..support.transitions import PAIRS, Bench, check_pair, eventfd, shared_file
from ..support.waiting import signalled, wait_until
from ..support.walks import walk

VERSION_1 = 1 << 32
MEMORY_BYTES = 4 << 20
DISK_BYTES = 4 << 20
ADDRESS = 0x1000_0000


@contextmanager
def bench(queue_size=256, **options):
    with (
        GuestMemory(MEMORY_BYTES) as memory,
        SplitQueue(memory, queue_size) as queue,
        Sim.blk(DISK_BYTES, timeout_s=5, **options) as device,
    ):
        device.map([memory.region])
        yield Bench(device, memory, queue, VERSION_1)


@contextmanager
def running_disk(queue_size=256):
    with bench(queue_size) as made:
        made.device.accept_features(VERSION_1)
        made.queue.attach(made.device, 0)
        made.device.start()
        yield made, KnownDisk(BlockDriver(made.memory, made.queue))


@pytest.mark.parametrize(("operation", "state"), PAIRS, ids=lambda value: value.name)
def test_every_pair(operation, state):
    with bench() as made:
        check_pair(made, operation, state)


def test_random_walks():
    walk(bench, b"vdpabridge-sim", examples=25)


def test_it_can_do_everything():
    with bench() as made:
        assert made.device.capabilities == set(Capability)


def test_io():
    with running_disk() as (_, disk):
        for block in range(80):
            disk.write(block)
        disk.settle(disk.driver.drain())
        assert disk.verify() == 80
        disk.driver.get_id()
        assert disk.driver.drain()[-1].data.startswith(b"vdpabridge-sim")
        disk.driver.flush()
        assert len(disk.driver.drain()) == 1


@pytest.mark.parametrize(
    ("kind", "sector", "sizes", "answer"),
    [
        (0, DISK_BYTES // 512, {"read_bytes": 512}, "IOERR"),  # beyond the end
        (1, DISK_BYTES // 512 - 1, {"data": bytes(1024)}, "IOERR"),  # across it
        (0, 0, {"read_bytes": 100}, "IOERR"),  # part of a sector
        (77, 0, {"read_bytes": 512}, "UNSUPP"),
    ],
)
def test_requests_that_are_none(kind, sector, sizes, answer):
    with running_disk() as (_, disk):
        disk.driver.submit(kind, sector, **sizes)
        with pytest.raises(BlockError, match=answer):
            disk.driver.drain()


def test_features():
    with bench() as made:
        with pytest.raises(FeatureError, match="not offered"):
            made.device.accept_features(VERSION_1 | 1 << 34)
        with pytest.raises(FeatureError, match="VERSION_1"):
            made.device.accept_features(1 << 9)
        assert made.device.state is RunState.RESET
        made.device.accept_features(made.device.offered_features)


def test_indirect_descriptors():
    with running_disk() as (made, disk):
        memory, queue = made.memory, made.queue
        header, data, status, table = memory.allocate(16), memory.allocate(20), memory.allocate(1), memory.allocate(48)
        memory.slice(header, 16)[:] = struct.pack("<IIQ", 8, 0, 0)
        rows = [(header, 16, 1, 1), (data, 20, 3, 2), (status, 1, 2, 0)]
        memory.slice(table, 48)[:] = b"".join(struct.pack("<QIHH", *row) for row in rows)
        head = queue.add([(table, 48)])
        struct.pack_into("<H", memory.slice(queue.setup.desc_address + 16 * head, 16), 12, 4)
        disk.driver.queue.kick()
        wait_until(lambda: list(queue.used()) == [(head, 21)])
        assert bytes(memory.slice(data, 14)) == b"vdpabridge-sim"


BROKEN_CHAINS = {
    "an address that is not mapped": lambda memory, queue: queue.add([(0x10, 16)], [(0x20, 1)]),
    "a chain without end": lambda memory, queue: descriptor(
        memory, queue, queue.add([(ADDRESS, 16)]), flags=1, following=0
    ),
    "a descriptor beyond the table": lambda memory, queue: descriptor(
        memory, queue, queue.add([(ADDRESS, 16)]), flags=1, following=9999
    ),
    "an indirect table in an odd size": lambda memory, queue: descriptor(
        memory, queue, queue.add([(ADDRESS, 17)]), flags=4
    ),
    "an indirect table outside": lambda memory, queue: descriptor(memory, queue, queue.add([(0x10, 16)]), flags=4),
    "something to read after something to write": lambda memory, queue: descriptor(
        memory, queue, queue.add([(ADDRESS, 16)], [(ADDRESS, 16)]), flags=3, following=0, then=0
    ),
    "an available index that leaps": lambda memory, queue: memory.slice(queue.setup.avail_address + 2, 2).__setitem__(
        slice(None), struct.pack("<H", 30000)
    ),
}


def descriptor(memory, queue, head, *, flags, following=0, then=None):
    place = memory.slice(queue.setup.desc_address + 16 * head, 16)
    if then is not None:
        second = struct.unpack_from("<H", place, 14)[0]
        struct.pack_into("<HH", memory.slice(queue.setup.desc_address + 16 * second, 16), 12, then, 0)
        following = second
    struct.pack_into("<HH", place, 12, flags, following)


@pytest.mark.parametrize("name", BROKEN_CHAINS)
def test_a_driver_that_breaks_the_rules_hears_of_it_and_harms_nobody(name):
    """The queue stops and its error eventfd is signalled; the device lives, and can be reset and used again."""
    with running_disk() as (made, _), eventfd() as err:
        made.device.set_err(0, err)
        os.set_blocking(err, False)
        BROKEN_CHAINS[name](made.memory, made.queue)
        made.queue.kick()
        wait_until(lambda: signalled(err))
        made.device.check_health()
        made.device.suspend()
        made.device.reset()
        with SplitQueue(made.memory, 64) as queue:
            made.device.accept_features(VERSION_1)
            queue.attach(made.device, 0)
            made.device.start()
            again = BlockDriver(made.memory, queue)
            again.get_id()
            assert again.drain()[0].data.startswith(b"vdpabridge-sim")


def test_two_queues_and_one_that_is_stopped_alone():
    with running_disk() as (made, disk), SplitQueue(made.memory, 64) as second_queue:
        second_queue.attach(made.device, 1)
        second = BlockDriver(made.memory, second_queue)
        second.get_id()
        assert second.drain()
        second.get_id()
        second.drain()
        assert made.device.stop_queue(1) == SplitBase(2)
        second.get_id()
        second_queue.kick()
        disk.write(3)
        disk.settle(disk.driver.drain())
        assert second.done() == []
        made.device.set_base(1, SplitBase(2))
        made.device.enable_queue(1)
        assert len(second.drain()) == 1


def test_a_queue_that_is_disabled_waits():
    with running_disk() as (made, disk):
        made.device.enable_queue(0, False)
        disk.driver.get_id()
        made.queue.kick()
        time.sleep(0.02)
        assert disk.driver.done() == []
        made.device.enable_queue(0)
        assert len(disk.driver.drain()) == 1


# --- suspend, with requests in flight ---


def test_suspend_finishes_what_was_taken_and_nothing_else():
    with running_disk() as (made, disk):
        made.device.faults.latency_s = 0.05
        for block in range(20):
            disk.write(block)
        made.queue.kick()
        wait_until(lambda: made.device._engine.workers[0].ring.avail_index == 20)
        made.device.suspend()
        assert made.queue.device_used_index == 20
        for block in range(20, 40):
            disk.write(block)
        made.queue.kick()
        time.sleep(0.02)
        assert made.queue.device_used_index == 20
        assert made.device.get_base(0) == SplitBase(20)
        made.device.resume()
        disk.settle(disk.driver.drain())
        assert disk.verify() == 40


def test_a_drain_that_does_not_end_is_a_deadline_and_the_device_goes_on():
    with running_disk() as (made, disk):
        made.device.timeout_s = 0.05
        made.device.faults.latency_s = 0.6
        disk.write(1)
        made.queue.kick()
        wait_until(lambda: made.device._engine.workers[0].ring.avail_index == 1)
        with pytest.raises(DeadlineExceeded, match="still in flight"):
            made.device.suspend()
        assert made.device.state is RunState.RUNNING
        # also what comes only now: it does not go on draining
        made.device.timeout_s = 5
        made.device.faults.latency_s = 0
        disk.write(2)
        disk.settle(disk.driver.drain())
        assert disk.verify() == 2


def test_in_flight_requests_survive_a_suspend_that_does_not_drain():
    with running_disk() as (made, disk):
        device = made.device
        device.suspend()
        region = device.get_inflight(2, 256)
        device.set_inflight(region)
        device.resume()
        device.faults.latency_s = 60
        for block in range(30):
            disk.write(block)
        made.queue.kick()
        wait_until(lambda: device._engine.workers[0].ring.avail_index == 30)
        device.suspend(drain=False)
        assert made.queue.device_used_index == 0
        device.faults.latency_s = 0
        device.resume()
        disk.settle(disk.driver.drain())
        assert disk.writes_confirmed == 30
        os.close(region.fd)
        assert disk.verify() == 30


def test_without_a_region_nothing_is_left_behind():
    with running_disk() as (made, _), pytest.raises(VdpaBridgeError, match="in-flight region"):
        made.device.suspend(drain=False)


def test_another_device_answers_what_a_dead_one_had_taken():
    """The region outlives the device, as it does a back-end's process: every request is answered once."""
    with (
        GuestMemory(MEMORY_BYTES) as memory,
        SplitQueue(memory, 256) as queue,
        shared_file(1 << 16) as file,
        shared_file(DISK_BYTES) as disk_file,
    ):
        path = f"/proc/self/fd/{disk_file}"
        region = InflightRegion(file, 1 << 16, 0, 1, 256)
        disk = KnownDisk(BlockDriver(memory, queue))
        with disk_of(path) as first:
            attach(first, memory, queue, region)
            first.faults.die_after_requests = 10
            for block in range(40):
                disk.write(block)
            queue.kick()
            wait_until(lambda: queue.device_used_index == 10)
        disk.settle(disk.driver.done())
        with disk_of(path) as second:
            # as QEMU does after a crash: it knows the used index only
            attach(second, memory, queue, region, base=queue.device_used_index)
            disk.settle(disk.driver.drain())
            assert disk.writes_confirmed == 40
            assert disk.verify() == 40


@contextmanager
def disk_of(path):
    from vdpabridge.drivers.sim.blk import BlockModel

    with Sim(BlockModel.of_file(path), "sim:file", timeout_s=5) as device:
        yield device


def attach(device, memory, queue, region=None, base=0):
    device.map([memory.region])
    if region is not None:
        device.set_inflight(region)
    device.accept_features(VERSION_1)
    queue.attach(device, 0, base)
    device.start()


def test_the_region_tells_of_a_death_between_two_steps():
    """After the used index was published and before that was noted: the request is done, and not done again."""
    from vdpabridge.drivers.sim.inflight import InflightTable

    table = bytearray(16 + 16 * 4)
    first = InflightTable(memoryview(table), 4)
    assert first.recover(7) == []
    for head in (2, 0):
        first.take(head)
    first.about_to_use(2)
    second = InflightTable(memoryview(table), 4)
    assert second.recover(8) == [0], "2 was used: the ring's index says so"
    assert InflightTable(memoryview(table), 4).recover(8) == [0]
    assert table[:16] == struct.pack("=QHHHH", 0, 1, 4, 2, 8)


# --- dirty log ---


def test_the_log_has_exactly_the_pages_that_were_written():
    with running_disk() as (made, disk), shared_file(DIRTY_BYTES) as log:
        disk.write(5)
        disk.settle(disk.driver.drain())
        made.device.set_dirty_log(DirtyLog(log, DIRTY_BYTES))
        request = disk.driver.read(5 * 8, 4096)
        disk.driver.drain()
        written = {page(made.queue.setup.used_address)}
        _, data, status = disk.driver._slots[request.slot]
        written |= {page(data), page(data + 4095), page(status)}
        used_entry = made.queue.setup.used_address + 4 + 8 * 1
        assert dirty_pages(log) == written | {page(used_entry)}
        disk.driver.write(6 * 8, bytes(4096))
        made.device.set_dirty_log(None)
        before = dirty_pages(log)
        disk.driver.drain()
        assert dirty_pages(log) == before


DIRTY_BYTES = (ADDRESS + MEMORY_BYTES) // 4096 // 8


def page(address):
    return address // 4096


def dirty_pages(log):
    content = os.pread(log, DIRTY_BYTES, 0)
    return {8 * at + bit for at, byte in enumerate(content) if byte for bit in range(8) if byte >> bit & 1}


def test_bits_of_several_writers_are_all_kept():
    """Two devices of one guest share a log: no bit of one is lost to a write of the other."""
    with shared_file(4096) as file, SharedMapping(file, 4096) as mapping:
        threads = [
            threading.Thread(
                target=lambda start=start: [atomic_set_bits(mapping, bit) for bit in 2 * list(range(start, 32768, 4))]
            )
            for start in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bytes(mapping.view) == b"\xff" * 4096


def test_a_stopped_queue_stays_stopped_when_the_device_resumes():
    with bench() as made:
        made.device.accept_features(VERSION_1)
        made.queue.attach(made.device, 0)
        made.device.start()
        made.device.stop_queue(0)
        made.device.suspend()
        made.device.resume()
        assert made.device.queues[0].enabled is False
        driver = BlockDriver(made.memory, made.queue)
        driver.flush()
        made.queue.kick()
        time.sleep(0.1)
        assert driver.done() == []


# --- memory ---


def test_memory_comes_and_goes():
    with bench() as made:
        with pytest.raises(ValueError, match="overlaps"):
            made.device.map([MemoryRegion(ADDRESS + 4096, 4096, made.memory.fileno())])
        with pytest.raises(ValueError, match="address space"):
            made.device.map([MemoryRegion(0, 4096, made.memory.fileno(), address_space=1)])
        made.device.accept_features(VERSION_1)
        made.queue.attach(made.device, 0)
        made.device.unmap([made.memory.region])
        with pytest.raises(VdpaBridgeError, match="not mapped"):
            made.device.start()
        assert made.device.state is RunState.CONFIGURED


def test_a_buffer_may_lie_in_two_regions():
    with running_disk() as (made, _), shared_file(8192) as file:
        made.device.map([MemoryRegion(0x9000_0000, 4096, file), MemoryRegion(0x9000_1000, 4096, file, 4096)])
        header, status = made.memory.allocate(16), made.memory.allocate(1)
        made.memory.slice(header, 16)[:] = struct.pack("<IIQ", 1, 0, 0)
        os.pwrite(file, b"x" * 8192, 0)
        made.queue.add([(header, 16), (0x9000_0E00, 1024)], [(status, 1)])
        made.queue.kick()
        wait_until(lambda: len(list(made.queue.used())) == 1)
        assert made.memory.slice(status, 1)[0] == 0


def test_no_write_where_the_guest_may_not_be_written():
    with running_disk() as (made, _), shared_file(4096) as file, eventfd() as err:
        os.set_blocking(err, False)
        made.device.set_err(0, err)
        made.device.map([MemoryRegion(0x9000_0000, 4096, file, writable=False)])
        header, status = made.memory.allocate(16), made.memory.allocate(1)
        made.memory.slice(header, 16)[:] = struct.pack("<IIQ", 0, 0, 0)
        made.queue.add([(header, 16)], [(0x9000_0000, 512), (status, 1)])
        made.queue.kick()
        wait_until(lambda: signalled(err))
        assert os.pread(file, 4096, 0) == bytes(4096)


# --- configuration space ---


def test_write_cache_mode():
    with running_disk() as (made, _), eventfd() as changed:
        os.set_blocking(changed, False)
        made.device.set_config_call(changed)
        assert made.device.read_config(0, 8) == struct.pack("<Q", DISK_BYTES // 512)
        assert made.device.read_config(32, 1) == b"\1"
        made.device.write_config(32, b"\0")
        assert made.device.read_config(32, 1) == b"\0"
        assert os.eventfd_read(changed) == 1
        made.device.write_config(0, bytes(8))
        assert made.device.read_config(0, 8) == struct.pack("<Q", DISK_BYTES // 512), "read-only"
        with pytest.raises(BlockingIOError):
            os.eventfd_read(changed)


# --- state ---


def test_a_disk_goes_on_in_another_device():
    with running_disk() as (made, disk), Sim.blk(DISK_BYTES, timeout_s=5) as other:
        for block in range(50):
            disk.write(block)
        disk.settle(disk.driver.drain())
        for block in range(50, 80):
            disk.write(block)
        made.device.suspend()
        pump(made.device, other)
        attach(other, made.memory, made.queue, base=made.device.get_base(0).avail_index)
        disk.settle(disk.driver.drain())
        assert disk.verify() == 80


def test_save_harms_nothing_and_repeats():
    with running_disk() as (made, disk):
        disk.write(0)
        disk.settle(disk.driver.drain())
        made.device.suspend()
        assert state_of(made.device) == state_of(made.device)
        made.device.resume()
        assert disk.verify() == 1


def test_every_byte_counts():
    """Whatever byte is changed, wherever it is cut: load says no, and the device is as it was."""
    with Sim.fs(timeout_s=5) as source, Sim.fs(timeout_s=5) as destination:
        state = state_of(source)
        before = state_of(destination)
        for at in range(len(state)):
            bent = bytearray(state)
            bent[at] ^= 1 << at % 8
            with pytest.raises(VdpaBridgeError):
                load(destination, bytes(bent))
            with pytest.raises(VdpaBridgeError):
                load(destination, state[:at])
        with pytest.raises(VdpaBridgeError, match="follows its end"):
            load(destination, state + b"\0")
        assert state_of(destination) == before
        load(destination, state)


def test_state_of_another_kind():
    with Sim.fs(timeout_s=5) as fs, Sim.blk(DISK_BYTES, timeout_s=5) as blk, Sim.blk(DISK_BYTES * 2) as larger:
        with pytest.raises(VdpaBridgeError, match="device id 26, and this is 2"):
            load(blk, state_of(fs))
        with pytest.raises(VdpaBridgeError, match="size_bytes"):
            load(blk, state_of(larger))


def test_a_load_that_was_not_checked_is_dropped():
    with Sim.blk(DISK_BYTES, timeout_s=5) as source, bench() as made:
        state = state_of(source)
        made.device.accept_features(VERSION_1)
        made.queue.attach(made.device, 0)
        reader, writer = os.pipe()
        made.device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
        os.write(writer, state)
        os.close(writer)
        made.device.start()
        made.device.suspend()
        with pytest.raises(VdpaBridgeError, match="no transfer was begun"):
            made.device.check_state()


FAULTS = {
    "refuse_transfer": (Faults(refuse_transfer=True), "told to refuse", RunState.RESET),
    "fail_check": (Faults(fail_check=True), "told to fail", RunState.RESET),
    "die_in_transfer": (Faults(die_in_transfer=True), "told to die", RunState.FAILED),
}


@pytest.mark.parametrize("direction", StateDirection)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_transfer(name, direction):
    faults, why, state = FAULTS[name]
    with Sim.fs(timeout_s=5) as source, Sim.fs(timeout_s=5) as destination:
        faulty = source if direction is StateDirection.SAVE else destination
        for field in Faults.__slots__:
            setattr(faulty.faults, field, getattr(faults, field))
        with pytest.raises(VdpaBridgeError, match=why):
            load(destination, state_of(source))
        assert faulty.state is state
        if state is RunState.FAILED:
            with pytest.raises(DeviceFailed):
                faulty.check_health()
            faulty.reset()
            faulty.faults.die_in_transfer = False
            assert state_of(faulty)


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({"cut_state_bytes": 0}, "ends in the middle"),
        ({"cut_state_bytes": 100}, "ends in the middle"),
        ({"version": 1}, "of version 1, and this is version 2"),
    ],
)
def test_state_that_is_short_or_of_another_version(faults, why):
    with Sim.fs(timeout_s=5) as source, Sim.fs(timeout_s=5) as destination:
        for name, value in faults.items():
            setattr(source.faults, name, value)
        with pytest.raises(VdpaBridgeError, match=why):
            load(destination, state_of(source))


def test_a_transfer_that_is_slow_to_begin():
    with Sim.fs(timeout_s=5) as source:
        source.faults.stall_s = 0.05
        assert state_of(source)
        source.timeout_s = 0.02
        source.faults.stall_s = 30
        with open(os.devnull, "wb") as nowhere:
            source.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, os.dup(nowhere.fileno()))
            with pytest.raises(DeadlineExceeded):
                source.check_state()


def test_a_writer_that_stalls_is_a_deadline():
    with Sim.fs(timeout_s=0.05) as device:
        reader, writer = os.pipe()
        device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
        with pytest.raises(DeadlineExceeded, match="has not closed"):
            device.check_state()
        os.close(writer)


def test_a_reader_that_leaves_is_an_error():
    with Sim.blk(1 << 20, timeout_s=5) as device:
        reader, writer = os.pipe()
        os.close(reader)
        device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
        with pytest.raises(VdpaBridgeError, match="Broken pipe"):
            device.check_state()


def test_it_dies_when_told_to():
    with running_disk() as (made, disk):
        made.device.faults.die_after_requests = 3
        for block in range(10):
            disk.write(block)
        made.queue.kick()
        wait_until(lambda: made.queue.device_used_index == 3)
        wait_until(lambda: made.device._engine.failed)
        with pytest.raises(DeviceFailed, match="answered 3 requests"):
            made.device.suspend()
        assert made.device.state is RunState.FAILED


def test_requests_fail_when_told_to():
    with running_disk() as (made, disk):
        made.device.faults.fail_requests = True
        disk.driver.read(0, 512)
        with pytest.raises(BlockError, match="IOERR"):
            disk.driver.drain()


# --- what must not be lost ---


def tracked_disk(made, queue_count=2):
    """A `KnownDisk` on ``made``, whose requests are noted in an in-flight region."""
    region = made.device.get_inflight(queue_count, 256)
    made.device.set_inflight(region)
    os.close(region.fd)
    made.device.accept_features(VERSION_1)
    made.queue.attach(made.device, 0)
    made.device.start()
    return KnownDisk(BlockDriver(made.memory, made.queue))


def leave_in_flight(made, disk, count):
    """Have ``count`` requests taken and left, by a suspend that does not drain."""
    made.device.faults.latency_s = 3600
    for block in range(count):
        disk.write(block)
    made.queue.kick()
    wait_until(lambda: len(made.device._engine.workers[0].ring.taken) == count)
    made.device.suspend(drain=False)
    made.device.faults.latency_s = 0


def test_a_drain_includes_what_an_earlier_device_had_taken():
    """More than one batch of it, and the suspend comes at once."""
    with bench() as made:
        disk = tracked_disk(made)
        leave_in_flight(made, disk, 80)
        made.device.resume()
        made.device.suspend()
        assert made.device.get_base(0) == SplitBase(80)
        assert made.queue.device_used_index == 80
        disk.settle(disk.driver.done())
        assert disk.writes_confirmed == 80


def test_a_queue_that_the_region_does_not_cover_is_not_stopped_without_a_drain():
    with bench() as made, SplitQueue(made.memory, 64) as second:
        tracked_disk(made, queue_count=1)
        second.attach(made.device, 1)
        with pytest.raises(VdpaBridgeError, match="queue 1 has no in-flight region"):
            made.device.suspend(drain=False)
        assert made.device.state is RunState.RUNNING
        assert sorted(made.device._engine.workers) == [0, 1]


def test_a_suspend_that_fails_leaves_disabled_queues_disabled():
    with running_disk() as (made, disk), SplitQueue(made.memory, 64) as second_queue:
        second_queue.attach(made.device, 1)
        made.device.enable_queue(0, False)
        made.device.timeout_s = 0.05
        made.device.faults.latency_s = 0.4
        second = BlockDriver(made.memory, second_queue)
        second.get_id()
        second_queue.kick()
        wait_until(lambda: made.device._engine.workers[1].ring.taken)
        with pytest.raises(DeadlineExceeded):
            made.device.suspend()
        made.device.timeout_s = 5
        made.device.faults.latency_s = 0
        disk.write(0)
        made.queue.kick()
        assert len(second.drain()) == 1
        time.sleep(0.02)
        assert disk.driver.done() == []


def test_good_requests_are_answered_although_a_bad_one_follows():
    with running_disk() as (made, disk):
        made.device.faults.latency_s = 0.05
        for block in range(3):
            disk.write(block)
        descriptor(made.memory, made.queue, made.queue.add([(ADDRESS, 16)]), flags=1, following=9999)
        made.queue.kick()
        wait_until(lambda: made.device._engine.workers[0].broken)
        made.device.suspend()
        assert made.queue.device_used_index == 3


def test_the_driver_is_asked_to_kick_again():
    """A device before may have asked it not to."""
    with bench() as made:
        made.memory.slice(made.queue.setup.used_address, 2)[:] = b"\1\0"
        made.device.accept_features(VERSION_1)
        made.queue.attach(made.device, 0)
        made.device.start()
        assert made.memory.slice(made.queue.setup.used_address, 2) == b"\0\0"


def test_a_chain_that_wants_too_much_is_refused():
    """An indirect table that names the same memory over and over."""
    with running_disk() as (made, _), eventfd() as err:
        os.set_blocking(err, False)
        made.device.set_err(0, err)
        rows = 2000
        table = made.memory.allocate(16 * rows)
        row = lambda n: struct.pack("<QIHH", ADDRESS, 1 << 20, int(n + 1 < rows), n + 1 if n + 1 < rows else 0)  # noqa: E731
        made.memory.slice(table, 16 * rows)[:] = b"".join(map(row, range(rows)))
        descriptor(made.memory, made.queue, made.queue.add([(table, 16 * rows)]), flags=4)
        made.queue.kick()
        wait_until(lambda: signalled(err))
        assert "and more" in made.device._engine.workers[0].broken


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("=QHHHH", 0, 1, 60000, 0, 0),
        struct.pack("=QHHHH", 0, 1, 256, 60000, 0),
        struct.pack("=QHHHH", 0, 7, 256, 0, 0),
    ],
)
def test_in_flight_regions_that_are_none(header):
    with bench() as made, shared_file(1 << 14) as file:
        os.pwrite(file, header, 0)
        made.device.set_inflight(InflightRegion(file, 1 << 14, 0, 1, 256))
        made.device.accept_features(VERSION_1)
        made.queue.attach(made.device, 0)
        with pytest.raises(VdpaBridgeError, match="in-flight region"):
            made.device.start()
        assert made.device.state is RunState.CONFIGURED


def test_a_batch_that_was_published_is_not_done_again():
    """Of another device, which uses several chains at a time: they are linked, last first."""
    from vdpabridge.drivers.sim.inflight import InflightTable

    table = bytearray(16 + 16 * 4)
    struct.pack_into("=QHHHH", table, 0, 0, 1, 4, 2, 5)
    for head, following in ((0, 0), (1, 0), (2, 1), (3, 0)):
        struct.pack_into("=B5xHQ", table, 16 + 16 * head, 1, following, head)
    assert InflightTable(memoryview(table), 4).recover(8) == [3]


def test_a_page_that_was_written_is_logged_although_the_answer_breaks_off():
    with running_disk() as (made, _), shared_file(8192) as file, shared_file(1 << 20) as log, eventfd() as err:
        os.set_blocking(err, False)
        made.device.set_err(0, err)
        made.device.map([MemoryRegion(0x9000_0000, 4096, file)])
        made.device.set_dirty_log(DirtyLog(log, 1 << 20))
        header, status = made.memory.allocate(16), made.memory.allocate(1)
        made.memory.slice(header, 16)[:] = struct.pack("<IIQ", 0, 0, 0)
        made.queue.add([(header, 16)], [(0x9000_0800, 4096), (status, 1)])
        made.queue.kick()
        wait_until(lambda: signalled(err))
        assert os.pread(log, 1, 0x90000 // 8) == b"\1"


def test_a_short_write_is_an_error():
    with bench() as made, shared_file(DISK_BYTES) as disk_file:
        del made
        path = f"/proc/self/fd/{disk_file}"
        with disk_of(path) as device, GuestMemory(MEMORY_BYTES) as memory, SplitQueue(memory, 64) as queue:
            attach(device, memory, queue)
            os.ftruncate(disk_file, 4096)
            driver = BlockDriver(memory, queue)
            driver.read(0, 8192 // 2)
            driver.drain()
            driver.read(8, 4096)
            with pytest.raises(BlockError, match="IOERR"):
                driver.drain()


def test_it_dies_again_and_again():
    with bench() as made:
        made.device.faults.die_after_requests = 2
        for _ in range(2):
            with SplitQueue(made.memory, 64) as queue:
                made.device.accept_features(VERSION_1)
                queue.attach(made.device, 0)
                made.device.start()
                driver = BlockDriver(made.memory, queue)
                for _ in range(4):
                    driver.get_id()
                queue.kick()
                wait_until(lambda: made.device._engine.failed)
                assert queue.device_used_index == 2
                made.device.reset()


def test_a_kick_has_to_be_an_eventfd():
    with bench() as made, shared_file(8) as file:
        made.device.accept_features(VERSION_1)
        with pytest.raises(ValueError, match="not an eventfd"):
            made.device.set_kick(0, file)


def test_a_call_that_is_full_does_not_block():
    with running_disk() as (made, disk), eventfd() as call:
        os.eventfd_write(call, (1 << 64) - 2)
        made.device.set_call(0, call)
        disk.write(0)
        made.queue.kick()
        wait_until(lambda: made.queue.device_used_index == 1)
        made.device.suspend()


def test_an_empty_file_is_no_disk(tmp_path):
    path = tmp_path / "empty"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no whole sector"):
        Sim.blk_file(str(path))


# --- what fails leaves nothing half done ---


def test_queues_go_on_after_a_suspend_that_failed():
    """It was not over in time: the device is not suspended, so its queues are not draining either."""
    with running_disk() as (made, disk):
        made.device.faults.latency_s = 0.3
        for block in range(4):
            disk.write(block)
        made.queue.kick()
        wait_until(lambda: made.device._engine.workers[0].ring.taken)
        made.device.timeout_s = 0.05
        with pytest.raises(DeadlineExceeded):
            made.device.suspend()
        made.device.timeout_s = 5
        made.device.faults.latency_s = 0
        for block in range(4, 8):
            disk.write(block)
        disk.settle(disk.driver.drain())
        assert disk.verify() == 8


@pytest.mark.parametrize("call", [1, 2])
def test_queues_go_on_after_a_suspend_that_was_interrupted(call, monkeypatch):
    """Ctrl-C between any two steps of it: told to drain, waited for, taken out."""
    with running_disk() as (made, disk):
        engine = made.device._engine
        real, calls = engine._thread.call, []

        def disturbed(function, timeout_s):
            calls.append(function)
            if len(calls) == call:
                if call > 1:
                    real(function, timeout_s)
                raise KeyboardInterrupt
            return real(function, timeout_s)

        monkeypatch.setattr(engine._thread, "call", disturbed)
        try:
            made.device.suspend()
        except KeyboardInterrupt:
            assert made.device.state is RunState.RUNNING
        monkeypatch.undo()
        disk.write(1)
        if call == 2:
            # its queues were out already, and where they stood is known
            made.device.suspend()
        if made.device.state is RunState.SUSPENDED:
            made.device.resume()
        disk.settle(disk.driver.drain())
        assert disk.verify() == 1


def test_it_is_idle_where_no_thread_works():
    with running_disk() as (made, _):
        assert not made.device.is_idle()
        made.device.suspend()
        assert made.device.is_idle()
        made.device.resume()
        made.device._engine.failed = "a test says so"
        assert made.device.is_idle(), "one that died does nothing more"


@pytest.mark.parametrize("at", [DISK_BYTES - 511, DISK_BYTES, 1 << 62])
def test_state_with_content_outside_of_the_disk(at):
    facts = json.dumps({"size_bytes": DISK_BYTES, "writeback": True, "in_memory": True}).encode()
    stream = b"".join(encode(2, [facts, struct.pack("<Q", at) + bytes(512)]))
    with (
        Sim.blk(DISK_BYTES, timeout_s=5) as device,
        pytest.raises(VdpaBridgeError, match="content outside of the disk"),
    ):
        load(device, stream)
