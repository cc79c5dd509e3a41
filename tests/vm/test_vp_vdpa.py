"""vp_vdpa: a virtio device on the PCI bus as a vDPA device, which does DMA by itself, through an IOMMU.

The device is QEMU's disk, behind QEMU's IOMMU. This is what hardware looks like that leaves the translation to the
platform: vhost-vdpa pins the memory and maps it into a domain of the IOMMU.
"""

import time
from errno import EOPNOTSUPP
from pathlib import Path

import pytest

from vdpabridge.bus import Bus
from vdpabridge.bus.netlink import VdpaNetlink
from vdpabridge.device import Capability, RunState, SplitBase
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import KernelError, MissingCapability
from vdpabridge.layers import suspendable

from .conftest import MEMORY_BYTES, block_bench, running_disk

NAME, SERIAL = "vp0", "tested"


def rebind(function, driver):
    """Take PCI ``function`` from its driver, and have ``driver`` take it."""
    (function / "driver/unbind").write_text(function.name)
    (function / "driver_override").write_text(driver)
    Path("/sys/bus/pci/drivers", driver, "bind").write_text(function.name)


@pytest.fixture(scope="module")
def node():
    (disk,) = [disk for disk in Path("/sys/block").glob("vd*") if (disk / "serial").read_text().strip() == SERIAL]
    function = (disk / "device").resolve().parent
    rebind(function, "vp-vdpa")
    try:
        with VdpaNetlink() as netlink:
            netlink.add(NAME, f"pci/{function.name}")
            try:
                yield Bus().bind(NAME, "vhost_vdpa").node
            finally:
                netlink.delete(NAME)
    finally:
        rebind(function, "virtio-pci")


def pinned_bytes():
    """The memory of this process that is pinned for devices."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPin:")]
    return int(line.split()[1]) << 10


def test_what_it_is_and_cannot_do(node):
    with VhostVdpa.open(node) as device:
        assert (device.identity.device_id, device.identity.queue_count) == (2, 2)
        assert {Capability.SUSPEND, Capability.RESUME, Capability.ENABLE_WHILE_RUNNING} & device.capabilities == set()


def test_io_again_and_again(node):
    for _ in range(3):
        with running_disk(node) as (bench, disk):
            for block in range(50):
                disk.write(block)
            disk.settle(disk.driver.drain())
            assert disk.verify() == 50
            bench.device.reset()
            assert bench.device.state is RunState.RESET


def test_memory_is_pinned_as_long_as_it_is_mapped(node):
    with block_bench(node) as bench:
        assert pinned_bytes() == MEMORY_BYTES
        bench.reach(RunState.RUNNING)
        bench.device.reset()
        assert pinned_bytes() == MEMORY_BYTES
        bench.device.unmap(bench.device.regions)
        assert pinned_bytes() == 0
    assert pinned_bytes() == 0


def test_memory_that_was_taken_away_is_out_of_its_reach(node):
    """The IOMMU stops it: it does not even see that there is a request, until its memory is mapped again."""
    with running_disk(node) as (bench, disk):
        bench.device.unmap(bench.device.regions)
        disk.write(0)
        time.sleep(0.5)
        assert disk.driver.done() == []
        bench.device.map([bench.memory.region])
        bench.queue.kick()
        disk.settle(disk.driver.drain())
        assert disk.verify() == 1


def test_nobody_knows_where_its_queues_stand(node):
    with block_bench(node) as bench:
        bench.reach(RunState.CONFIGURED)
        with pytest.raises(KernelError) as caught:
            bench.device.get_base(0)
        assert caught.value.errno == EOPNOTSUPP
        bench.device.set_base(0, SplitBase(0))
        with pytest.raises(KernelError) as caught:
            bench.device.set_base(0, SplitBase(7))
        assert caught.value.errno == EOPNOTSUPP


def test_it_cannot_continue_where_it_stood_either(node):
    """vp_vdpa takes no position but the first (vp_vdpa_set_vq_state): to drain it and reset it would not help."""
    with suspendable(VhostVdpa.open(node)) as device:
        assert isinstance(device, VhostVdpa)
        assert device.state is RunState.RESET


def test_it_cannot_be_suspended(node):
    with running_disk(node) as (bench, _), pytest.raises(MissingCapability):
        bench.device.suspend()
