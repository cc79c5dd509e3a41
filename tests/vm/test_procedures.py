"""Save, load and migrate from any driver to any: vDPA disks of a real kernel, and the same disk in this process, each
by itself and through a vhost-user socket."""

import os
from contextlib import contextmanager
from dataclasses import replace

import pytest

from vdpabridge.device import Capability, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.procedures import load, migrate, save
from vdpabridge.state.snapshot import QueueEventfds
from vdpabridge.state.transfer.channel import Limits

from ..support.pair import bridged
from ..support.transitions import shared_file
from .conftest import MEMORY_BYTES, VERSION_1
from .test_suspend import SHARED_DISK

DRIVERS = ["vhost-vdpa", "vhost-user over vhost-vdpa", "sim", "vhost-user over sim"]
DISK_BYTES = 128 << 20


def limits():
    return Limits(Deadline(60))


class KernelsDisk(Sim):
    """What the kernel's simulator is to a guest: no state of its own, and that configuration."""

    capabilities = frozenset(Capability) - {Capability.DEVICE_STATE}
    config = b""

    @property
    def identity(self):
        return replace(super().identity, config_size_bytes=len(self.config))

    def _read_config(self, offset, size):
        return self.config[offset : offset + size]


@contextmanager
def lower_device(node, driver):
    """The device at ``node``, or one that looks like it."""
    with VhostVdpa.open(node) as device:
        if driver.endswith("vhost-vdpa"):
            yield device
            return
        config = device.read_config()
    with KernelsDisk.blk(DISK_BYTES, timeout_s=30) as device:
        device.config = config
        yield device


@contextmanager
def opened(node, driver):
    """The device that ``driver`` says, for ``node``, itself or through a vhost-user socket."""
    with lower_device(node, driver) as lower:
        if not driver.startswith("vhost-user"):
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


def finish(disk, *drivers):
    disk.settle(disk.driver.drain())
    assert disk.writes_confirmed == 70
    kinds = {driver.endswith("vhost-vdpa") for driver in drivers}
    if SHARED_DISK and kinds == {True}:
        assert disk.verify() == 70
    # what is written from now on is on the disk that the guest has now; which one has done the pending requests, this
    # one or, when it was stopped, the other, is not to be known
    late = KnownDisk(disk.driver)
    for block in range(100, 130):
        late.write(block)
    assert late.verify() == 30


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
        finish(disk, driver, to)


@pytest.mark.parametrize("to", DRIVERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_save_and_load(block_node, second_block_node, driver, to):
    with (
        at_work(block_node, driver) as (source, disk, eventfds, memory),
        opened(second_block_node, to) as destination,
        shared_file(0) as file,
    ):
        report = save(source, file, limits(), stay_suspended=True)
        assert report.state_bytes == 0, "no kernel gives a device's own state"
        os.lseek(file, 0, os.SEEK_SET)
        destination.map([memory.region])
        assert load(destination, file, limits(), eventfds).digest == report.digest
        finish(disk, driver, to)


def test_a_running_disk_goes_on_after_a_save(block_node):
    with at_work(block_node, "vhost-vdpa") as (source, disk, _, _), shared_file(0) as file:
        save(source, file, limits())
        assert source.state is RunState.RUNNING
        finish(disk, "vhost-vdpa")
