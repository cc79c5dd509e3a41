"""Save, load and migrate with vDPA devices of a real kernel, also into devices behind other drivers and back."""

import os
from contextlib import contextmanager

import pytest

from vdpabridge.deadline import Deadline
from vdpabridge.device import RunState
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.memory import GuestMemory
from vdpabridge.state.channel import Limits
from vdpabridge.state.procedures import load, migrate, save
from vdpabridge.state.snapshot import QueueEventfds
from vdpabridge.virtqueue import SplitQueue
from vdpabridge.workload.block import BlockDriver, KnownDisk

from ..support.pair import bridged
from ..support.transitions import shared_file
from .conftest import MEMORY_BYTES, VERSION_1
from .test_suspend import SHARED_DISK

DRIVERS = ["vhost-vdpa", "vhost-user over vhost-vdpa"]


def limits():
    return Limits(Deadline(60))


@contextmanager
def opened(node, driver):
    """The device at ``node``, itself or through a vhost-user socket."""
    with VhostVdpa.open(node) as lower:
        if driver == "vhost-vdpa":
            yield lower
        else:
            with bridged(lower, timeout_s=30) as device:
                yield device


@contextmanager
def at_work(node, driver):
    """(device, disk, eventfds, memory): with requests pending."""
    with (
        GuestMemory(MEMORY_BYTES) as memory,
        SplitQueue(memory, 256) as queue,
        opened(node, driver) as device,
    ):
        device.map([memory.region])
        device.accept_features(VERSION_1)
        queue.attach(device, 0)
        device.start()
        disk = KnownDisk(BlockDriver(memory, queue))
        for block in range(40):
            disk.write(block)
        disk.settle(disk.driver.drain())
        for block in range(40, 70):
            disk.write(block)
        yield device, disk, {0: QueueEventfds(queue.kick_fd, queue.call_fd)}, memory


def finish(disk):
    disk.settle(disk.driver.drain())
    assert disk.writes_confirmed == 70
    if SHARED_DISK:
        assert disk.verify() == 70


@pytest.mark.parametrize("to", DRIVERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_migrate(block_node, second_block_node, driver, to):
    with (
        at_work(block_node, driver) as (source, disk, _, memory),
        opened(second_block_node, to) as destination,
    ):
        destination.map([memory.region])
        migrate(source, destination, limits())
        assert (source.state, destination.state) == (RunState.RESET, RunState.RUNNING)
        finish(disk)


@pytest.mark.parametrize("driver", DRIVERS)
def test_save_and_load(block_node, second_block_node, driver):
    with (
        at_work(block_node, driver) as (source, disk, eventfds, memory),
        opened(second_block_node, driver) as destination,
        shared_file(0) as file,
    ):
        report = save(source, file, limits(), go_on=False)
        assert report.state_bytes == 0, "no kernel gives a device's own state"
        os.lseek(file, 0, os.SEEK_SET)
        destination.map([memory.region])
        assert load(destination, file, limits(), eventfds).digest == report.digest
        finish(disk)


def test_a_running_disk_goes_on_after_a_save(block_node):
    with at_work(block_node, "vhost-vdpa") as (source, disk, _, _), shared_file(0) as file:
        save(source, file, limits())
        assert source.state is RunState.RUNNING
        finish(disk)
