"""vdpa_sim_net: three queues in two groups, two address spaces, frames that come back."""

import errno
from contextlib import contextmanager

import pytest

from vdpabridge.abi.virtio_net import (
    VIRTIO_NET_CONFIG,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MAC,
)
from vdpabridge.device import Capability, MemoryRegion, RunState, SplitBase
from vdpabridge.drivers.vhost_vdpa import MappingError, VhostVdpa
from vdpabridge.errors import KernelError, StateError
from vdpabridge.memory import GuestMemory
from vdpabridge.state.replay import replay
from vdpabridge.state.snapshot import capture

from ..support.net import CONTROL, RECEIVE, SEND, NetDriver
from .conftest import MEMORY_BYTES, VERSION_1

MAC = bytes.fromhex("525400c0ffee")
FEATURES = VERSION_1 | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR


@contextmanager
def card(node):
    """(device, driver): running, the control queue in an address space of its own."""
    with GuestMemory(MEMORY_BYTES) as memory, GuestMemory(1 << 16) as control, VhostVdpa.open(node) as device:
        net = NetDriver(memory, control)
        try:
            region = control.region
            device.accept_features(FEATURES)
            device.set_group_address_space(device.queue_group(CONTROL), 1)
            # both memories at the same guest address: only the address space tells them apart
            device.map(
                [memory.region, MemoryRegion(region.guest_address, region.size_bytes, region.fd, address_space=1)]
            )
            for index, queue in enumerate(net.queues):
                queue.attach(device, index)
            device.start()
            yield device, net
        finally:
            net.close()


def frame(number):
    return b"\xff" * 6 + MAC + number.to_bytes(2, "big") + bytes([number & 0xFF]) * 100


def test_identity_and_groups(net_node):
    with VhostVdpa.open(net_node) as device:
        assert device.identity.device_id == 1
        assert device.identity.queue_count == 3
        assert (device.group_count, device.address_space_count) == (2, 2)
        assert [device.queue_group(index) for index in range(3)] == [0, 0, 1]


def test_frames_come_back_and_control_works(net_node):
    with card(net_node) as (device, net):
        assert net.set_mac(MAC) == 0
        assert VIRTIO_NET_CONFIG.decode(device.read_config())["mac"] == MAC
        net.post(8)
        for number in range(8):
            net.transmit(frame(number))
        assert net.received(8) == [frame(number) for number in range(8)]


def test_suspend_keeps_every_queue(net_node):
    """Frames and a control command that wait while the card is suspended are done afterwards, once."""
    with card(net_node) as (device, net):
        net.post(20)
        for number in range(5):
            net.transmit(frame(number))
        net.received(5)
        device.suspend()
        assert [device.get_base(index) for index in (SEND, CONTROL)] == [SplitBase(5), SplitBase(0)]
        # vdpa_sim_net takes a receive buffer only when there is a frame for it
        assert device.get_base(RECEIVE) == SplitBase(5)
        for number in range(5, 15):
            net.transmit(frame(number))
        assert net.receive.device_used_index == 5
        if Capability.RESUME in device.capabilities:
            device.resume()
        else:
            resume_by_hand(device, net)
        assert net.received(10) == [frame(number) for number in range(5, 15)]
        assert net.set_mac(MAC) == 0


def resume_by_hand(device, net):
    """What `replay` does, with the group assignment that a reset undoes (6.1 has no RESUME)."""
    bases = {index: device.get_base(index).avail_index for index in range(3)}
    device.reset()
    device.accept_features(FEATURES)
    device.set_group_address_space(1, 1)
    for index, queue in enumerate(net.queues):
        queue.attach(device, index, bases[index])
    device.start()


def test_a_reset_undoes_the_group_assignment(net_node):
    """After it the control queue is back in address space 0, so it is set up there, where its memory is mapped too."""
    with GuestMemory(MEMORY_BYTES) as memory, VhostVdpa.open(net_node) as device:
        net = NetDriver(memory, memory)
        try:
            device.map([memory.region])
            device.accept_features(FEATURES)
            device.set_group_address_space(1, 1)
            device.reset()
            device.accept_features(FEATURES)
            for index, queue in enumerate(net.queues):
                queue.attach(device, index)
            device.start()
            assert net.set_mac(MAC) == 0
            device.suspend()
            assert len(capture(device).queues) == 3
            replay(device)
            assert net.set_mac(MAC) == 0
        finally:
            net.close()


def test_group_assignment_is_refused_while_running(net_node):
    """By the driver on every kernel; the kernel itself does so from 7.2 on."""
    with card(net_node) as (device, _net):
        with pytest.raises(StateError, match="assign a queue group"):
            device.set_group_address_space(1, 0)
        assert device.state is RunState.RUNNING


def test_wrong_groups_and_spaces(net_node):
    with GuestMemory(1 << 16) as memory, VhostVdpa.open(net_node) as device:
        with pytest.raises(KernelError) as caught:
            device.set_group_address_space(0, 2)
        assert caught.value.errno == errno.EINVAL
        assert "address_space_count" in str(caught.value)
        region = memory.region
        with pytest.raises(MappingError, match="no address space 2"):
            device.map([MemoryRegion(region.guest_address, region.size_bytes, region.fd, address_space=2)])
