"""Every request to the kernel as a line."""

import re

import pytest

from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import KernelError
from vdpabridge.guest.memory import GuestMemory

from ..support.fake_kernel import FakeKernel


def test_requests_are_told_with_what_the_kernel_made_of_them():
    said = []
    with GuestMemory(1 << 20) as memory, VhostVdpa.open("/dev/vhost-vdpa-0", system=FakeKernel()) as device:
        device.trace_to(said.append)
        assert device.status == 0
        device.map([memory.region])
        with pytest.raises(KernelError):
            device.ioctl(0x1234)
    lines = [re.fullmatch(r"\d+\.\d{9} (.*) \(\d+ ns\)", line)[1] for line in said]
    assert lines[0] == "VHOST_VDPA_GET_STATUS 00 -> 0"
    update = next(line for line in lines if line.startswith("IOTLB"))
    assert f" iotlb.iova={memory.guest_address:#x} iotlb.size=0x100000 " in update
    assert "ioctl 0x1234 0x0 -> failed: ENOTTY" in lines
