"""The bridge: a vDPA device of a real kernel as a vhost-user back-end, with our own front-end before it."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

from vdpabridge.device import Capability, RunState, SplitBase
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..support.pair import bridged
from ..support.release import since
from .conftest import MEMORY_BYTES, VERSION_1


@contextmanager
def bridged_disk(node):
    """(the front-end's view, the vDPA device, a disk on the former) of a simulated vDPA disk."""
    with (
        GuestMemory(MEMORY_BYTES) as memory,
        SplitQueue(memory, 256) as queue,
        VhostVdpa.open(node) as lower,
        bridged(lower, timeout_s=30) as device,
    ):
        device.map([memory.region])
        device.accept_features(VERSION_1)
        queue.attach(device, 0)
        device.start()
        yield device, lower, KnownDisk(BlockDriver(memory, queue))


def test_what_comes_through(block_node):
    with bridged_disk(block_node) as (device, lower, _):
        assert device.identity.device_id == 2
        assert device.identity.config_size_bytes == lower.identity.config_size_bytes
        assert device.read_config() == lower.read_config()
        assert lower.state is RunState.RUNNING
        assert Capability.DEVICE_STATE not in device.capabilities, "no kernel has it: nobody is told that it is there"
        assert Capability.DIRTY_LOG not in device.capabilities


def test_io_across_suspends(block_node):
    with bridged_disk(block_node) as (device, lower, disk):
        for block in range(100):
            disk.write(block)
            if block % 40 == 39:
                disk.settle(disk.driver.drain())
        disk.settle(disk.driver.drain())
        for first in (100, 150, 200):
            device.suspend()
            assert lower.state is RunState.SUSPENDED
            for block in range(first, first + 50):
                disk.write(block)
            disk.driver.queue.kick()
            time.sleep(0.005)
            assert disk.driver.done() == []
            device.resume()
            disk.settle(disk.driver.drain())
        assert disk.verify() == 250


def test_a_simple_resume_is_the_kernels_own(block_node):
    """Nothing was set up anew: RESUME where the kernel has it (6.3), else reset and replay."""
    with bridged_disk(block_node) as (device, lower, disk):
        asked = []
        original = lower._reset
        lower._reset = lambda: (asked.append("reset"), original())
        device.suspend()
        device.resume()
        assert asked == since((6, 3), [], before=["reset"])
        disk.write(1)
        disk.settle(disk.driver.drain())


def test_a_queue_that_goes_on_elsewhere(block_node):
    """Another position than it stopped at is no resume: the device is reset and set up anew."""
    with bridged_disk(block_node) as (device, lower, disk):
        disk.write(1)
        disk.settle(disk.driver.drain())
        device.suspend()
        assert device.get_base(0) == SplitBase(1)
        with GuestMemory(MEMORY_BYTES, 0x8000_0000) as memory, SplitQueue(memory, 64) as queue:
            device.map([memory.region])
            queue.attach(device, 0)
            device.resume()
            driver = BlockDriver(memory, queue)
            driver.get_id()
            assert driver.drain()[0].data.startswith(b"vdpa_blk_sim")
            device.suspend()
            device.unmap([memory.region])
        assert lower.state is RunState.SUSPENDED


def test_a_guest_that_resets(block_node):
    with bridged_disk(block_node) as (device, lower, disk):
        device.reset()
        assert lower.state is RunState.RESET
        queue = disk.driver.queue
        device.accept_features(VERSION_1)
        queue.attach(device, 0, queue.avail_index)
        device.start()
        disk.write(1)
        disk.settle(disk.driver.drain())
        assert lower.state is RunState.RUNNING


def test_a_front_end_that_leaves_and_one_that_comes(block_node):
    with VhostVdpa.open(block_node) as lower, GuestMemory(MEMORY_BYTES) as memory:
        for _ in range(3):
            with bridged(lower, timeout_s=30) as device, SplitQueue(memory, 64) as queue:
                device.map([memory.region])
                device.accept_features(VERSION_1)
                queue.attach(device, 0)
                device.start()
                driver = BlockDriver(memory, queue)
                driver.get_id()
                assert len(driver.drain()) == 1
            assert lower.state is RunState.SUSPENDED
            assert lower.regions == []


def test_the_command_serves_it(block_node, tmp_path):
    path = str(tmp_path / "s")
    words = [sys.executable, "-m", "vdpabridge", "serve", block_node, "--socket-path", path]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        with VhostUser.open(path, device_id=2, timeout_s=60) as device:
            assert device.identity.config_size_bytes == 96
        busy = subprocess.run(
            [*words[:4], block_node, "--socket-path", path + "2"], capture_output=True, text=True, check=False
        )
        assert busy.returncode == 1
        assert "busy" in busy.stderr.lower()
        assert not os.path.exists(path + "2")
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert server.returncode == 0


def test_print_capabilities_of_a_vdpa_device(block_node):
    words = [sys.executable, "-m", "vdpabridge", "serve", block_node, "--print-capabilities"]
    with VhostVdpa.open(block_node):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["type"] == "block", "it is not opened, so it may be in use"
