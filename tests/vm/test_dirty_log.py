"""A dirty log in front of a real kernel's vhost-vdpa, which keeps none: compared with the guest's memory, byte by byte."""

import os
import threading
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.device import Capability, SplitBase
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.layers import Logged, loggable

from ..layers.test_logged import Bitmap, changed, used_ring_page
from ..support.disk_lab import Lab
from ..support.pair import bridged
from ..support.unlogged import PAGE

ROUNDS = 50


@contextmanager
def logged_disk(node, *, through):
    """(the device as its user sees it, the layer, the guest's memory and ring, a log)."""
    with ExitStack() as stack:
        layer = stack.enter_context(loggable(VhostVdpa.open(node, timeout_s=60)))
        assert isinstance(layer, Logged)
        device = stack.enter_context(bridged(layer, timeout_s=60)) if through == "vhost-user" else layer
        assert Capability.DIRTY_LOG in device.capabilities
        lab = Lab(stack, device)
        bitmap = Bitmap(lab)
        stack.callback(os.close, bitmap.fd)
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
        marked, written = bitmap.pages(), changed(lab, before)
        assert written <= marked
        assert used_ring_page(lab) in marked
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
