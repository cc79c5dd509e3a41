"""A VDUSE device: a daemon in user space behind a vhost-vdpa node. The daemon is QEMU's, with a disk in memory.

What it can do comes from the kernel (no SUSPEND before 7.3, no PERSIST) and from libvduse.
"""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from vdpabridge.bus import Bus
from vdpabridge.bus.netlink import VdpaNetlink
from vdpabridge.device import Capability, RunState
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import DeadlineExceeded, MissingCapability

from ..support.waiting import wait_until
from .conftest import block_bench, check_served_without_suspend, running_disk

NAME = "vduse0"
SIZE_BYTES = 16 << 20
MAPS_BYTES = 4 << 20
AUTOPROBE = Path("/sys/bus/vdpa/drivers_autoprobe")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    disk = tmp_path_factory.mktemp("vduse") / "disk"
    disk.write_bytes(bytes(SIZE_BYTES))
    # it writes this when its exports are set up. The node in /dev/vduse is there earlier, before the device has queues:
    # the kernel refuses to add it so early
    ready = tmp_path_factory.mktemp("vduse") / "pid"
    words = ["qemu-storage-daemon", "--pidfile", str(ready)]
    words += ["--blockdev", f"driver=file,filename={disk},node-name=disk"]
    words += ["--export", f"type=vduse-blk,id=export,node-name=disk,name={NAME},num-queues=2,writable=on"]
    with subprocess.Popen(words) as process:
        wait_until(ready.exists)
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def node(daemon):
    with VdpaNetlink() as netlink:
        # virtio_vdpa would take it first, and lockdep objects to its requests: vduse_domain_map_page takes a lock with
        # interrupts off that vduse_domain_alloc_coherent takes with them on (iova_domain.c, seen in 6.12)
        AUTOPROBE.write_text("0")
        try:
            netlink.add(NAME, "vduse")
        finally:
            AUTOPROBE.write_text("1")
        try:
            yield Bus().bind(NAME, "vhost_vdpa").node
        finally:
            netlink.delete(NAME)


def test_what_it_is_and_can_do(node):
    with VhostVdpa.open(node, timeout_s=10) as device:
        assert (device.identity.device_id, device.identity.queue_count) == (2, 2)
        assert {Capability.RESUME, Capability.ENABLE_WHILE_RUNNING} & device.capabilities == set()
        assert device.address_space_count == 1


def test_io_again_and_again(node):
    """Each opener finds a device that was reset, and leaves none of its memory mapped in the daemon."""
    for _ in range(3):
        with running_disk(node) as (bench, disk):
            for block in range(50):
                disk.write(block)
            disk.settle(disk.driver.drain())
            assert disk.verify() == 50
            bench.device.reset()
            assert bench.device.state is RunState.RESET


def test_memory_is_mapped_again_after_a_reset(node):
    with block_bench(node) as bench:
        for _ in range(2):
            bench.reach(RunState.RUNNING)
            bench.device.reset()
        assert [region.size_bytes for region in bench.device.regions] == [MAPS_BYTES]
        assert bench.device.iotlb.entries == {(0, bench.memory.guest_address): MAPS_BYTES}


def test_it_is_served_all_the_same(node):
    check_served_without_suspend(node)


def test_it_cannot_be_suspended(node):
    with running_disk(node) as (bench, _):
        if Capability.SUSPEND in bench.device.capabilities:
            bench.device.suspend()
            return
        with pytest.raises(MissingCapability):
            bench.device.suspend()


def test_a_daemon_that_does_not_answer_costs_no_more_than_the_deadline(node, daemon):
    """It is stopped, and goes on later: the device is well then. To look whether it is idle asks the daemon nothing."""
    daemon.send_signal(signal.SIGSTOP)
    try:
        begin_s = time.monotonic()
        Bus().check_idle(NAME, "delete")
        with pytest.raises(DeadlineExceeded, match="open"):
            VhostVdpa.open(node, timeout_s=0.5)
        assert time.monotonic() - begin_s < 20
    finally:
        daemon.send_signal(signal.SIGCONT)

    def opens():
        try:
            with VhostVdpa.open(node, timeout_s=10) as device:
                return device.identity.device_id == 2
        except OSError:
            return False

    wait_until(opens, 40)
