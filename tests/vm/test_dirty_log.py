"""A dirty log in front of a real kernel's vhost-vdpa, which keeps none: compared with the guest's memory, byte by byte."""

import os
import threading
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.abi.virtio_net import VIRTIO_NET_F_MAC
from vdpabridge.device import Capability, SplitBase
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.layers import Logged, loggable
from vdpabridge.state.replay import resume

from ..support.dirty_log import PAGE, Bitmap, changed, covering, pages_of, used_ring_page
from ..support.disk_lab import Lab
from ..support.net import RECEIVE, SEND, NetDriver
from ..support.pair import bridged
from .conftest import MEMORY_BYTES, VERSION_1

#: ``make soak`` has more.
ROUNDS = int(os.environ.get("VDPABRIDGE_ROUNDS", "50"))
#: The card takes nothing else that is not for its own address.
BROADCAST = b"\xff" * 6


@contextmanager
def logged_disk(node, *, through):
    """(the device as its user sees it, the layer, the guest's memory and ring, a log)."""
    with ExitStack() as stack:
        layer = stack.enter_context(loggable(VhostVdpa.open(node, timeout_s=60)))
        assert isinstance(layer, Logged)
        device = stack.enter_context(bridged(layer, timeout_s=60)) if through == "vhost-user" else layer
        assert Capability.DIRTY_LOG in device.capabilities
        lab = Lab(stack, device)
        bitmap = stack.enter_context(Bitmap(lab.memory))
        yield device, layer, lab, bitmap


@pytest.mark.parametrize("through", ["the library", "vhost-user"])
def test_every_page_that_changes_is_in_the_log(block_node, through):
    with logged_disk(block_node, through=through) as (device, layer, lab, bitmap):
        lab.finish()
        # what is read lies in other pages than what was there before
        buffers = {buffer // PAGE for _, buffer, _ in lab.disk.driver._slots}
        for _, buffer, _ in lab.disk.driver._slots:
            lab.memory.slice(buffer, PAGE)[:] = b"\xa5" * PAGE
        before = bytes(lab.memory.view)
        device.set_dirty_log(bitmap.log)
        assert layer.marks_all == ""
        lab.disk.verify()
        device.suspend()
        marked, written = bitmap.pages(), changed(lab.memory, before, lab.queue)
        assert written <= marked
        assert used_ring_page(lab.queue) in marked
        assert len(buffers & written) >= 70, "the disk's blocks were read into these"
        assert device.get_base(0) == SplitBase(lab.queue.device_used_index)


def test_to_and_fro_under_load(block_node):
    with logged_disk(block_node, through="the library") as (device, layer, lab, bitmap):
        lab.finish()
        stopped, failures = threading.Event(), []

        def work():
            try:
                while not stopped.is_set():
                    for block in range(20):
                        lab.disk.write(block)
                    lab.disk.settle(lab.disk.driver.drain(60))
            except BaseException as error:
                failures.append(error)
                raise

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(ROUNDS):
                device.set_dirty_log(bitmap.log)
                assert layer.marks_all == ""
                device.set_dirty_log(None)
        finally:
            stopped.set()
            thread.join()
        assert failures == []
        lab.finish()


def test_what_a_log_leaves_behind(block_node):
    """The next one who opens the device finds it as ever."""
    for _ in range(3):
        with logged_disk(block_node, through="the library") as (device, _, lab, bitmap):
            device.set_dirty_log(bitmap.log)
            lab.finish()
    with VhostVdpa.open(block_node, timeout_s=60) as device, ExitStack() as stack:
        Lab(stack, device).finish()


def test_what_a_network_card_receives(net_node):
    """Its two queues stand at different places, and buffers to receive into wait in one of them."""
    with loggable(VhostVdpa.open(net_node, timeout_s=60)) as device, ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
        net = NetDriver(memory, memory)
        stack.callback(net.close)
        device.map([memory.region])
        device.accept_features(VERSION_1 | 1 << VIRTIO_NET_F_MAC)
        for index in (RECEIVE, SEND):
            net.queues[index].attach(device, index)
        device.start()
        bitmap = stack.enter_context(Bitmap(memory))
        net.post(40)
        # the guest writes what it sends into the pages from here on
        sent = pages_of(memory) - covering(memory.guest_address, memory.allocate(1, PAGE) - memory.guest_address)
        for round_ in range(6):
            bitmap.clear()
            device.set_dirty_log(bitmap.log)
            assert device.marks_all == ""
            before = bytes(memory.view)
            frames = [BROADCAST + bytes([round_, number]) * 700 for number in range(5)]
            for frame in frames:
                net.transmit(frame)
            assert net.received(5) == frames
            if round_ % 2:
                device.suspend()
                assert device.get_base(RECEIVE) == device.get_base(SEND) == SplitBase(5 * round_ + 5)
                resume(device)
            marked = bitmap.pages()
            written = changed(memory, before, net.receive, net.send) - sent
            assert written <= marked
            assert written
            device.set_dirty_log(None)
