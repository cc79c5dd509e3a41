"""Suspended means stopped, resumed means nothing lost: by real requests in flight."""

import os
import select
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.abi.vhost import VhostIoctl
from vdpabridge.device import Capability, RunState, SplitBase
from vdpabridge.errors import MissingCapability
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.state.replay import replay, resume
from vdpabridge.state.snapshot import QueueEventfds, capture, restore

from ..support.release import since
from .conftest import block_bench, running_disk

QUEUE_SIZE = 256
#: A request takes 3 descriptors: 85 fill a ring of 256.
FULL_RING = QUEUE_SIZE // 3
#: Long enough for the simulator to do many requests, were it running.
LOOK_S = 0.05
#: vdpa_sim_blk.shared_backend came with 6.6: before, every device has a RAM disk of its own.
SHARED_DISK = since((6, 6), True, before=False)


def submit_pending(disk, count, first=0):
    """``count`` writes to fresh blocks on a suspended device, with a kick."""
    for block in range(first, first + count):
        disk.write(block)
    disk.driver.queue.kick()


def assert_nothing_happens(disk, count):
    queue = disk.driver.queue
    before = queue.device_used_index
    queue.kick()
    time.sleep(LOOK_S)
    assert queue.device_used_index == before
    assert disk.driver.done() == []
    assert queue.pending == count


@pytest.mark.parametrize("count", [1, 8, FULL_RING])
@pytest.mark.parametrize("way", [resume, replay], ids=["resume", "replay"])
def test_same_device(running, count, way):
    bench, disk = running
    disk.write(200)
    disk.settle(disk.driver.drain())
    bench.device.suspend()
    base = bench.device.get_base(0)
    submit_pending(disk, count)
    assert_nothing_happens(disk, count)
    assert bench.device.get_base(0) == base == SplitBase(1)
    took = way(bench.device)
    if way is resume:
        assert took is since((6, 3), Capability.RESUME, before=None)
    assert bench.device.state is RunState.RUNNING
    finished = disk.driver.drain()
    assert len(finished) == count
    disk.settle(finished)
    assert disk.verify() == count + 1


@pytest.mark.parametrize("count", [1, 8, FULL_RING])
def test_second_device(block_node, second_block_node, count):
    """Requests that the first device never saw are done by the second, from the same ring in the same memory."""
    with running_disk(block_node) as (bench, disk):
        for block in range(100, 140):
            disk.write(block)
        disk.settle(disk.driver.drain())
        bench.device.suspend()
        submit_pending(disk, count)
        assert_nothing_happens(disk, count)
        snapshot = capture(bench.device)
        with block_bench(second_block_node) as other:
            go_on_in(other, bench, disk, snapshot)
            finished = disk.driver.drain()
            assert len(finished) == count
            disk.settle(finished)
            assert disk.verify() == count + 40
            assert bench.device.state is RunState.SUSPENDED


def go_on_in(other, bench, disk, snapshot):
    """Have another device go on with the first one's memory, ring and eventfds."""
    if not SHARED_DISK:
        copy_disk(disk, other)
    other.device.unmap([other.memory.region])
    other.device.map([bench.memory.region])
    restore(other.device, snapshot, {0: QueueEventfds(bench.queue.kick_fd, bench.queue.call_fd)})
    other.device.start()


def copy_disk(disk, other):
    """What shared storage does for real devices: the second disk gets the blocks that the first confirmed."""
    device = other.device
    device.accept_features(other.features)
    other.queue.attach(device, 0)
    device.start()
    copy = KnownDisk(BlockDriver(other.memory, other.queue), dict.fromkeys(disk.generations, 0))
    for block, generation in disk.generations.items():
        while copy.generations[block] < generation:
            copy.write(block)
            copy.settle(copy.driver.drain())
    device.reset()


@contextmanager
def nothing_else_runs():
    """This process alone has the CPUs: what it wakes, the simulator's worker too, runs when the block is left."""
    cpus = sorted(os.sched_getaffinity(0))
    spin = ["sh", "-c", "while :; do :; done"]
    with ExitStack() as stack:
        for cpu in cpus[1:]:
            command = ["taskset", "--cpu-list", str(cpu), "chrt", "--fifo", "50", *spin]
            spinner = stack.enter_context(subprocess.Popen(command))
            stack.callback(spinner.kill)
            until_busy(spinner)
        os.sched_setaffinity(0, {cpus[0]})
        stack.callback(os.sched_setaffinity, 0, cpus)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(40))
        stack.callback(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
        yield


def until_busy(process, timeout_s=10.0):
    """Wait until ``process`` does nothing but compute: three looks in a row that find it running, with time used."""
    end = time.monotonic() + timeout_s
    seen, before_ticks = 0, 0
    while seen < 3:
        assert time.monotonic() < end, "it does not get to run"
        time.sleep(0.01)
        with open(f"/proc/{process.pid}/stat", encoding="ascii") as stat:
            name, _, rest = stat.read().rpartition(")")
        fields = rest.split()
        ticks = int(fields[11])  # in user mode
        seen = seen + 1 if name.endswith("(sh") and fields[0] == "R" and ticks > before_ticks else 0
        before_ticks = ticks


def suspend_in_flight(bench, disk, count):
    """Submit and kick ``count`` requests and suspend before the device's worker had a chance to finish them."""
    before = bench.queue.used_index
    with nothing_else_runs():
        # in here: a worker that still looks after an earlier kick would find them
        for block in range(count):
            disk.write(block)
        bench.queue.kick()
        bench.device.suspend()
        done = (bench.queue.device_used_index - before) & 0xFFFF
    time.sleep(LOOK_S)
    assert (bench.queue.device_used_index - before) & 0xFFFF == done, "answered after SUSPEND had returned"
    assert bench.device.get_base(0) == SplitBase((before + done) & 0xFFFF), "what was taken was answered"
    assert done < count, "the device was quicker: nothing was in flight, and nothing is shown"
    finished = disk.driver.done()
    assert len(finished) == done
    disk.settle(finished)
    assert disk.driver.inflight == count - done


@pytest.mark.parametrize("count", [1, 8, FULL_RING])
@pytest.mark.parametrize("way", [resume, replay], ids=["resume", "replay"])
def test_suspended_with_requests_in_flight(running, count, way):
    bench, disk = running
    for _ in range(3):
        suspend_in_flight(bench, disk, count)
        way(bench.device)
        disk.settle(disk.driver.drain())
    assert disk.writes_confirmed == 3 * count
    assert disk.verify() == count


@pytest.mark.parametrize("count", [1, 8, FULL_RING])
def test_suspended_with_requests_in_flight_and_carried(block_node, second_block_node, count):
    """What the first device did not do the second does: each request once, by one of the two."""
    with running_disk(block_node) as (bench, disk):
        suspend_in_flight(bench, disk, count)
        snapshot = capture(bench.device)
        with block_bench(second_block_node) as other:
            go_on_in(other, bench, disk, snapshot)
            disk.settle(disk.driver.drain())
            assert disk.writes_confirmed == count
            assert disk.verify() == count


def test_suspended_in_the_middle_of_bursts(running):
    """With ever other delays between kick and SUSPEND, so that bursts are cut anywhere."""
    bench, disk = running
    for round_number in range(40):
        submit_pending(disk, FULL_RING)
        until_s = time.monotonic() + round_number * 0.00005
        while time.monotonic() < until_s:
            pass
        bench.device.suspend()
        used = bench.queue.device_used_index
        assert bench.device.get_base(0) == SplitBase(used)
        time.sleep(0.002)
        assert bench.queue.device_used_index == used
        resume(bench.device)
        disk.settle(disk.driver.drain())
    assert disk.writes_confirmed == 40 * FULL_RING
    assert disk.verify() == FULL_RING


def test_flush_and_id_on_a_real_device(running):
    bench, disk = running
    driver = disk.driver
    driver.flush()
    driver.get_id()
    bench.device.suspend()
    driver.flush()
    resume(bench.device)
    identities = [request.data for request in driver.drain() if request.data]
    assert identities == [b"vdpa_blk_sim".ljust(20, b"\0")]


def test_200_cycles_under_load(running):
    """A second thread suspends and resumes while this one keeps the ring full."""
    bench, disk = running
    cycles = 0
    stop = threading.Event()
    failure = []

    def cycle():
        nonlocal cycles
        try:
            for _ in range(200):
                bench.device.suspend()
                resume(bench.device)
                cycles += 1
        except BaseException as error:
            failure.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=cycle)
    thread.start()
    try:
        while not stop.is_set():
            free = [block for block in range(2 * FULL_RING) if block not in disk.busy]
            for block in free[: disk.driver.capacity - disk.driver.inflight]:
                disk.write(block)
            bench.queue.kick()
            # waiting, not spinning: the other thread needs the interpreter too
            if select.select([bench.queue.call_fd], [], [], 0.005)[0]:
                os.eventfd_read(bench.queue.call_fd)
            disk.settle(disk.driver.done())
    finally:
        thread.join()
    assert not failure, failure[0]
    assert cycles == 200
    disk.settle(disk.driver.drain())
    assert disk.writes_confirmed > 200
    disk.verify()


def test_suspend_is_idempotent(running):
    bench, disk = running
    bench.device.suspend()
    bench.device.suspend()
    submit_pending(disk, 4)
    assert_nothing_happens(disk, 4)
    resume(bench.device)
    disk.settle(disk.driver.drain())
    disk.verify()


def test_rewriting_the_status_unsuspends_the_simulator(running):
    """Why the driver never does it: vhost goes on believing that the device is suspended."""
    bench, disk = running
    bench.device.suspend()
    submit_pending(disk, 3)
    bench.device._node.call(VhostIoctl.VHOST_VDPA_SET_STATUS, bytearray([0xF]))
    bench.queue.kick()
    disk.settle(disk.driver.drain())
    assert disk.writes_confirmed == 3


def test_kick_before_start_is_not_lost(bench):
    """Requests made available, and kicked, before the device runs are found by start()."""
    disk = KnownDisk(BlockDriver(bench.memory, bench.queue))
    bench.device.accept_features(bench.features)
    bench.queue.attach(bench.device, 0)
    submit_pending(disk, 5)
    bench.device.start()
    disk.settle(disk.driver.drain())
    assert disk.verify() == 5


def test_kick_before_enable_is_not_lost(bench):
    """A queue that is enabled while the device runs finds what was kicked before."""
    disk = KnownDisk(BlockDriver(bench.memory, bench.queue))
    bench.device.accept_features(bench.features)
    bench.queue.attach(bench.device, 0)
    bench.device.enable_queue(0, False)
    bench.device.start()
    submit_pending(disk, 5)
    time.sleep(LOOK_S)
    assert bench.queue.device_used_index == 0
    if Capability.ENABLE_WHILE_RUNNING not in bench.device.capabilities:  # before 6.6
        with pytest.raises(MissingCapability, match="enable every queue before start"):
            bench.device.enable_queue(0)
        return
    bench.device.enable_queue(0)
    disk.settle(disk.driver.drain())
    assert disk.verify() == 5


def test_index_wraps_around(bench):
    """A queue position past 2^16 is carried modulo 2^16."""
    bench.queue.avail_index = bench.queue.used_index = 0xFFF0
    view = bench.memory
    for area in (bench.queue.setup.avail_address, bench.queue.setup.used_address):
        view.slice(area + 2, 2)[:] = (0xFFF0).to_bytes(2, "little")
    disk = KnownDisk(BlockDriver(bench.memory, bench.queue))
    bench.device.accept_features(bench.features)
    bench.queue.attach(bench.device, 0, 0xFFF0)
    bench.device.start()
    for block in range(40):
        disk.write(block)
        disk.settle(disk.driver.drain())
    bench.device.suspend()
    assert bench.device.get_base(0) == SplitBase((0xFFF0 + 40) & 0xFFFF)
    resume(bench.device)
    assert disk.verify() == 40


def test_timeline_is_kept_across_a_reset_of_the_caller(running):
    """The snapshot alone, with the guest's memory, is enough: everything else is made anew."""
    bench, disk = running
    disk.write(1)
    disk.settle(disk.driver.drain())
    bench.device.suspend()
    submit_pending(disk, 2, first=2)
    snapshot = capture(bench.device)
    bench.device.close()
    bench.device = type(bench.device).open(bench.device.name)
    with bench.device as device:
        device.map([bench.memory.region])
        restore(device, snapshot, {0: QueueEventfds(bench.queue.kick_fd, bench.queue.call_fd)})
        device.start()
        disk.settle(disk.driver.drain())
        assert disk.verify() == 3
    assert os.path.exists(bench.device.name)
