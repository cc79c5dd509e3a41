"""Simulated devices on a real kernel. They are made once and shared: opening one resets it."""

import os
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from vdpabridge.bus import Bus
from vdpabridge.bus.netlink import VdpaNetlink
from vdpabridge.device import RunState, SplitBase
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.layers import Drained, suspendable

from ..support.disk_lab import Lab
from ..support.pair import bridged
from ..support.release import since
from ..support.transitions import Bench

VERSION_1 = 1 << 32


#: Needs the proposal of device state. The runner says whether the kernel is to have it; a bzImage of the user's may.
WITH_STATE = "VDPABRIDGE_WITH_STATE" in os.environ or Path("/sys/module/vdpa_sim_fs").exists()
collect_ignore = [
    *([] if WITH_STATE else ["state"]),
    *since((6, 3), [], before=["test_promises_resume.py"]),
]


def _pins():
    """Whether the simulator pins pages and has them counted as locked memory, as hardware does.

    Always before 6.4; from then on where ``vdpa_sim.use_va=0`` was given, while by default it maps by address.
    """
    try:
        return Path("/sys/module/vdpa_sim/parameters/use_va").read_text().strip() == "N"
    except FileNotFoundError:
        return True


PINS = _pins()
MEMORY_BYTES = 4 << 20


def make_device(name, parent):
    """The node of device ``name``, made where it is missing and bound to vhost_vdpa."""
    bus = Bus()
    if name not in {device.name for device in bus.devices()}:
        with VdpaNetlink() as netlink:
            netlink.add(name, parent)
    node = bus.bind(name, "vhost_vdpa").node
    assert node is not None
    return node


@pytest.fixture(scope="session")
def block_node():
    """The node of the simulated disk that most tests use."""
    return make_device("blk0", "vdpasim_blk")


@pytest.fixture(scope="session")
def second_block_node():
    """The node of another, with the same RAM disk behind it from 6.12 on."""
    return make_device("blk1", "vdpasim_blk")


@pytest.fixture(scope="session")
def net_node():
    """The node of a simulated network card."""
    return make_device("net0", "vdpasim_net")


@contextmanager
def block_bench(node, queue_size=256):
    """An opened device at ``node`` with mapped memory and a ring, in run state RESET."""
    with GuestMemory(MEMORY_BYTES) as memory, SplitQueue(memory, queue_size) as queue, VhostVdpa.open(node) as device:
        device.map([memory.region])
        yield Bench(device, memory, queue, VERSION_1)


@contextmanager
def running_disk(node, queue_size=256):
    """(bench, disk): the same, running, with a `KnownDisk` on it."""
    with block_bench(node, queue_size) as bench:
        disk = KnownDisk(BlockDriver(bench.memory, bench.queue))
        bench.device.accept_features(bench.features)
        bench.queue.attach(bench.device, 0)
        bench.device.start()
        yield bench, disk


def check_served_without_suspend(node):
    """A front-end stops and starts the disk again and again; each block is what was written to it."""
    with (
        suspendable(VhostVdpa.open(node, timeout_s=20)) as device,
        bridged(device, timeout_s=30) as front,
        ExitStack() as stack,
    ):
        lab = Lab(stack, front)
        for block in range(5):
            lab.finish()
            front.suspend()
            assert front.get_base(0) == SplitBase(lab.queue.device_used_index)
            # VDUSE has SUSPEND from 7.3 on
            assert not isinstance(device, Drained) or device.below.state is RunState.RESET
            front.resume()
            lab.disk.write(block)
        lab.finish()


@pytest.fixture
def bench(block_node):
    with block_bench(block_node) as made:
        yield made


@pytest.fixture
def running(block_node):
    with running_disk(block_node) as made:
        yield made
