"""vdpa_sim_net: three queues in two groups, two address spaces, frames that come back."""

import time
from contextlib import contextmanager

import pytest

from vdpabridge.abi.virtio_net import (
    VIRTIO_NET_CONFIG,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MAC,
)
from vdpabridge.device import MemoryRegion, SplitBase
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.losses import Loss
from vdpabridge.state.replay import replay, resume

from ..support.net import CONTROL, RECEIVE, SEND, NetDriver
from .conftest import MEMORY_BYTES, VERSION_1

#: Queue -> address space: control has one of its own.
SPACES = {RECEIVE: 0, SEND: 0, CONTROL: 1}
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
            # both memories at the same guest address: only the address space tells them apart
            device.map(
                [memory.region, MemoryRegion(region.guest_address, region.size_bytes, region.fd, address_space=1)]
            )
            for index, queue in enumerate(net.queues):
                queue.attach(device, index, address_space=SPACES[index])
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


@pytest.mark.parametrize("way", [resume, replay], ids=["resume", "replay"])
def test_suspend_keeps_every_queue(net_node, way):
    """Frames and a control command that wait while the card is suspended are done afterwards, once.

    A kernel without RESUME replays in both cases. What it loses is accepted: the control queue has set nothing yet.
    """
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
        net.submit_mac(MAC)
        time.sleep(0.05)
        assert (net.receive.device_used_index, net.control.device_used_index) == (5, 0)
        way(device, accept={Loss.CONTROL_QUEUE})
        assert net.received(10) == [frame(number) for number in range(5, 15)]
        assert net.answer() == 0
        assert net.set_mac(MAC) == 0


def test_a_reset_undoes_the_group_assignment(net_node):
    """After it the control queue is set up in address space 0 again, where its memory is mapped too."""
    with GuestMemory(MEMORY_BYTES) as memory, VhostVdpa.open(net_node) as device:
        net = NetDriver(memory, memory)
        try:
            device.map([memory.region])
            device.accept_features(FEATURES)
            net.control.attach(device, CONTROL, address_space=1)
            device.reset()
            device.accept_features(FEATURES)
            for index, queue in enumerate(net.queues):
                queue.attach(device, index)
            device.start()
            assert net.set_mac(MAC) == 0
        finally:
            net.close()


def test_queues_of_one_group_share_an_address_space(net_node):
    with GuestMemory(MEMORY_BYTES) as memory, VhostVdpa.open(net_node) as device:
        net = NetDriver(memory, memory)
        try:
            device.accept_features(FEATURES)
            net.receive.attach(device, RECEIVE)
            with pytest.raises(ValueError, match="queue 0, of the same group, is in address space 0"):
                net.send.attach(device, SEND, address_space=1)
            net.control.attach(device, CONTROL, address_space=1)
        finally:
            net.close()


def test_wrong_spaces(net_node):
    with GuestMemory(1 << 16) as memory, SplitQueue(memory, 8) as queue, VhostVdpa.open(net_node) as device:
        device.accept_features(FEATURES)
        with pytest.raises(ValueError, match="no address space 2"):
            queue.attach(device, 0, address_space=2)
        region = memory.region
        with pytest.raises(ValueError, match="no address space 2"):
            device.map([MemoryRegion(region.guest_address, region.size_bytes, region.fd, address_space=2)])
