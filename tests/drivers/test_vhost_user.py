"""The vhost-user driver, held to the state table, and all that the simulator can do, through a real socket."""

import os
import time
from contextlib import contextmanager

import pytest

from vdpabridge.device import Capability, DirtyLog, RunState, SplitBase, StateDirection, StatePhase
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import DeviceFailed, FeatureError, VdpaBridgeError
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..support.pair import bridged
from ..support.state import load, state_of
from ..support.transitions import PAIRS, Bench, check_pair, eventfd, shared_file
from ..support.waiting import signalled, wait_until
from ..support.walks import walk

VERSION_1 = 1 << 32
MEMORY_BYTES = 4 << 20
DISK_BYTES = 4 << 20


@contextmanager
def bench(queue_size=256, **options):
    with (
        GuestMemory(MEMORY_BYTES) as memory,
        SplitQueue(memory, queue_size) as queue,
        Sim.blk(DISK_BYTES, timeout_s=5) as sim,
        bridged(sim, **options) as device,
    ):
        device.map([memory.region])
        made = Bench(device, memory, queue, VERSION_1)
        made.sim = sim
        yield made


@contextmanager
def running_disk(**options):
    with bench(**options) as made:
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


def test_capabilities_come_through():
    with bench() as made:
        assert made.device.capabilities == set(Capability)
        assert made.device.identity == made.sim.identity
        assert made.device.offered_features == made.sim.offered_features


def test_io_across_suspend_and_resume():
    with running_disk() as (made, disk):
        for block in range(80):
            disk.write(block)
        disk.settle(disk.driver.drain())
        made.device.suspend()
        assert made.sim.state is RunState.SUSPENDED
        for block in range(80, 120):
            disk.write(block)
        made.queue.kick()
        time.sleep(0.02)
        assert made.queue.device_used_index == 80
        assert made.device.get_base(0) == SplitBase(80)
        made.device.resume()
        disk.settle(disk.driver.drain())
        assert disk.verify() == 120


def test_the_device_state_comes_through():
    with running_disk() as (made, disk), Sim.blk(DISK_BYTES, timeout_s=5) as other, bridged(other) as destination:
        for block in range(20):
            disk.write(block)
        disk.settle(disk.driver.drain())
        for block in range(20, 50):
            disk.write(block)
        made.device.suspend()
        state = state_of(made.device)
        load(destination, state)
        destination.map([made.memory.region])
        destination.accept_features(VERSION_1)
        made.queue.attach(destination, 0, made.device.get_base(0).avail_index)
        destination.start()
        disk.settle(disk.driver.drain())
        assert disk.verify() == 50


def test_state_that_is_refused_names_the_request_and_the_source_goes_on():
    reports = []
    with running_disk(reports=reports) as (made, disk):
        disk.write(1)
        disk.settle(disk.driver.drain())
        made.device.suspend()
        state = state_of(made.device)
        with pytest.raises(VdpaBridgeError, match="CHECK_DEVICE_STATE") as caught:
            load(made.device, state[:-1])
        assert (caught.value.request, caught.value.code) == (43, 1)
        assert "ends in the middle" in reports[-1]
        made.sim.faults.refuse_transfer = True
        with pytest.raises(VdpaBridgeError, match="SET_DEVICE_STATE_FD") as caught:
            state_of(made.device)
        assert (caught.value.request, caught.value.code) == (42, 0x101)
        made.device.resume()
        assert disk.verify() == 1


def test_a_transfer_that_was_abandoned_changes_nothing():
    with bench() as made, Sim.blk(DISK_BYTES, timeout_s=5) as other:
        made.device.accept_features(VERSION_1)
        state = state_of(other)
        reader, writer = os.pipe()
        made.device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
        os.write(writer, state[:50])
        os.close(writer)
        made.device.abandon_state()
        made.queue.attach(made.device, 0)
        made.device.start()
        assert made.device.state is RunState.RUNNING


def test_the_dirty_log_comes_through():
    with running_disk() as (made, disk), shared_file(1 << 16) as log:
        made.device.set_dirty_log(DirtyLog(log, 1 << 16))
        disk.write(3)
        disk.settle(disk.driver.drain())
        assert os.pread(log, 1 << 16, 0).strip(b"\0")
        made.device.set_dirty_log(None)
        os.pwrite(log, bytes(1 << 16), 0)
        disk.write(3)
        disk.settle(disk.driver.drain())
        assert not os.pread(log, 1 << 16, 0).strip(b"\0")


def test_in_flight_requests_come_through():
    with bench() as made:
        device = made.device
        region = device.get_inflight(2, 256)
        device.set_inflight(region)
        os.close(region.fd)
        device.accept_features(VERSION_1)
        made.queue.attach(device, 0)
        device.start()
        disk = KnownDisk(BlockDriver(made.memory, made.queue))
        made.sim.faults.latency_s = 60
        for block in range(30):
            disk.write(block)
        made.queue.kick()
        wait_until(lambda: made.sim._engine.workers[0].ring.avail_index == 30)
        device.suspend(drain=False)
        assert made.queue.device_used_index == 0
        made.sim.faults.latency_s = 0
        device.resume()
        disk.settle(disk.driver.drain())
        assert disk.verify() == 30


def test_the_configuration_space_comes_through():
    with running_disk() as (made, _), eventfd() as changed:
        os.set_blocking(changed, False)
        assert made.device.read_config() == made.sim.read_config()
        made.device.set_config_call(changed)
        made.device.write_config(32, b"\0")
        assert made.sim.read_config(32, 1) == b"\0"
        wait_until(lambda: signalled(changed))


def test_queues_are_stopped_and_started_one_by_one():
    with running_disk() as (made, disk), SplitQueue(made.memory, 64) as second_queue:
        second_queue.attach(made.device, 1)
        second = BlockDriver(made.memory, second_queue)
        second.get_id()
        assert len(second.drain()) == 1
        assert made.device.stop_queue(1) == SplitBase(1)
        assert made.sim.state is RunState.RUNNING
        second.get_id()
        second_queue.kick()
        disk.write(3)
        disk.settle(disk.driver.drain())
        assert second.done() == []
        made.device.enable_queue(1)
        assert len(second.drain()) == 1
        made.device.enable_queue(0, False)
        disk.write(4)
        made.queue.kick()
        time.sleep(0.02)
        assert disk.driver.done() == []
        made.device.enable_queue(0)
        disk.settle(disk.driver.drain())


def test_a_reset_reaches_the_device():
    with running_disk() as (made, _):
        made.device.write_config(32, b"\0")
        made.device.reset()
        assert made.sim.state is RunState.RESET
        made.device.accept_features(made.device.offered_features)
        assert made.sim.accepted_features == made.device.offered_features


def test_features_that_are_refused():
    with bench() as made:
        with pytest.raises(FeatureError, match="not offered"):
            made.device.accept_features(VERSION_1 | 1 << 34)
        with pytest.raises(FeatureError, match="refused"):
            made.device.accept_features(1 << 9)
        assert made.device.state is RunState.RESET
        made.device.accept_features(VERSION_1)


def test_a_back_end_that_leaves_is_a_device_that_failed():
    with bench() as made:
        made.device.accept_features(VERSION_1)
        made.device.check_health()
        os.close(os.dup(made.device.fileno()))
        made.device._requests.connection._socket.shutdown(2)
        with pytest.raises(DeviceFailed, match="closed the connection"):
            made.device.check_health()
        with pytest.raises(DeviceFailed):
            made.device.reset()
        assert made.device.state is RunState.FAILED
