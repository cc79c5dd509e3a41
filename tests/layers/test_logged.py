"""A dirty log for a device that keeps none: every page that the device writes is in it, and nothing is lost on the way."""

import os
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.abi.virtio import (
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET,
)
from vdpabridge.device import Capability, DirtyLog, Operation, RunState, SplitBase
from vdpabridge.drivers.sim import Sim
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.layers import Drained, Logged, loggable, suspendable
from vdpabridge.layers.relay import Relay
from vdpabridge.linux.mappings import memory_file
from vdpabridge.state.losses import Loss
from vdpabridge.state.procedures import migrate
from vdpabridge.state.replay import resume

from ..support.dirty_log import PAGE, Bitmap, changed, pages_of, used_ring_page
from ..support.disk_lab import DISK_BYTES, MEMORY_BYTES, VERSION_1, Lab, limits
from ..support.pair import bridged
from ..support.unlogged import Fixed, Unlogged, Unresumable

KINDS = [Unlogged, Fixed, Unresumable]


@contextmanager
def logged(cls, timeout_s=5):
    """(device, the guest's memory and ring on it, a log that is not set)."""
    with loggable(cls.blk(DISK_BYTES, timeout_s=timeout_s)) as device, ExitStack() as stack:
        assert isinstance(device, Logged)
        lab = Lab(stack, device)
        bitmap = stack.enter_context(Bitmap(lab.memory))
        yield device, lab, bitmap


def test_who_gets_a_layer():
    with Sim.blk(DISK_BYTES) as disk:
        assert loggable(disk) is disk
    with loggable(Unlogged.blk(DISK_BYTES)) as device:
        assert Capability.DIRTY_LOG in device.capabilities

    class Unsuspendable(Unlogged):
        lacks = Unlogged.lacks | {Capability.SUSPEND}

    with Unsuspendable.blk(DISK_BYTES) as disk:
        assert loggable(disk) is disk

    class Mute(Unlogged):
        lacks = Unlogged.lacks | {Capability.DEVICE_STATE}

    with Mute.fs() as server:
        assert loggable(server) is server, "it could not be migrated either"


def test_rings_that_are_not_relayed_are_not_offered():
    hidden = sum(1 << bit for bit in (VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFICATION_DATA))
    hidden |= 1 << VIRTIO_F_RING_RESET

    class Modern(Unlogged):
        @property
        def offered_features(self):
            return super().offered_features | hidden

    with loggable(Modern.blk(DISK_BYTES)) as device:
        assert device.below.offered_features & ~device.offered_features == hidden


@pytest.mark.parametrize("cls", KINDS)
def test_without_a_log_the_device_has_the_guests_rings(cls):
    with logged(cls) as (device, lab, _):
        lab.finish()
        assert device.below.queues[0].setup == lab.queue.setup
        assert [thread.name for thread in threading.enumerate() if "relay" in thread.name] == []


@pytest.mark.parametrize("cls", KINDS)
def test_every_page_that_the_device_writes_is_in_the_log(cls):
    with logged(cls) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        assert device.marks_all == ""
        setup = device.below.queues[0].setup
        assert setup.desc_address == lab.queue.setup.desc_address
        assert setup.used_address != lab.queue.setup.used_address
        device.below.pages.clear()
        lab.finish()
        before = bytes(lab.memory.view)
        lab.finish()
        device.suspend()
        marked = bitmap.pages()
        assert device.below.pages & pages_of(lab.memory) <= marked
        assert used_ring_page(lab.queue) in marked
        assert changed(lab.memory, before, lab.queue) <= marked
        assert len(marked) < MEMORY_BYTES // PAGE // 2, "and not simply every page"
        assert device.get_base(0) == SplitBase(lab.queue.device_used_index)


@pytest.mark.parametrize("cls", KINDS)
def test_a_log_that_is_set_before_the_start(cls):
    with loggable(cls.blk(DISK_BYTES, timeout_s=5)) as device, ExitStack() as stack:

        class Early(Lab):
            def __init__(self, stack, source):
                start = source.start

                def start_logged():
                    self.bitmap = stack.enter_context(Bitmap(self.memory))
                    source.set_dirty_log(self.bitmap.log)
                    start()

                source.start = start_logged
                super().__init__(stack, source)

        lab = Early(stack, device)
        lab.finish()
        device.suspend()
        assert device.below.pages & pages_of(lab.memory) <= lab.bitmap.pages()
        assert device.marks_all == ""


@pytest.mark.parametrize("cls", KINDS)
def test_to_and_fro_under_load(cls):
    """Requests are neither lost nor done twice: every block is read back."""
    with logged(cls) as (device, lab, bitmap):
        lab.finish()
        stopped = threading.Event()
        failures = []

        def work():
            try:
                while not stopped.is_set():
                    for block in range(20):
                        lab.disk.write(block)
                    lab.disk.settle(lab.disk.driver.drain())
            except BaseException as error:
                failures.append(error)
                raise

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for round_ in range(30):
                device.set_dirty_log(bitmap.log)
                assert (device.marks_all, device.state) == ("", RunState.RUNNING)
                time.sleep(0.002 * (round_ % 3))
                device.set_dirty_log(None)
                assert device.below.queues[0].setup == lab.queue.setup
        finally:
            stopped.set()
            thread.join()
        assert failures == []
        lab.finish()


def test_each_round_has_a_log_of_its_own():
    """As Cloud Hypervisor does it: what is in the old log when the call returns is all that it will have."""
    with logged(Fixed) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        lab.finish()
        second = Bitmap(lab.memory)
        device.below.pages.clear()
        device.set_dirty_log(second.log)
        before = bitmap.pages()
        lab.finish()
        device.suspend()
        assert bitmap.pages() == before
        assert device.below.pages & pages_of(lab.memory) <= second.pages()
        os.close(second.fd)


@pytest.mark.parametrize("cls", KINDS)
def test_suspended_and_resumed_with_a_log(cls):
    with logged(cls) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        for round_ in range(5):
            device.suspend()
            assert device.get_base(0) == SplitBase(lab.queue.device_used_index)
            before = lab.queue.device_used_index
            lab.disk.settle(lab.disk.driver.done())
            lab.disk.write(round_)
            lab.queue.kick()
            time.sleep(0.01)
            assert lab.queue.device_used_index == before
            resume(device)
            lab.finish()
        assert device.below.pages <= bitmap.pages() | {page for page in device.below.pages if page >= 1 << 22}


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_a_log_that_changes_while_it_is_suspended(cls, first):
    with logged(cls) as (device, lab, bitmap):
        if first:
            device.set_dirty_log(bitmap.log)
        device.suspend()
        device.set_dirty_log(None if first else bitmap.log)
        resume(device)
        lab.finish()
        assert (device.below.queues[0].setup == lab.queue.setup) is first
        device.suspend()
        if not first:
            assert device.below.pages & pages_of(lab.memory) - bitmap.pages() == set() or device.marks_all == ""


def test_it_is_moved_with_a_log():
    with logged(Fixed) as (device, lab, bitmap), Sim.blk(DISK_BYTES, timeout_s=5) as other:
        device.set_dirty_log(bitmap.log)
        other.map([lab.memory.region])
        migrate(device, other, limits())
        lab.finish()


def test_a_device_that_takes_no_arena_marks_everything_when_it_stops():
    class Narrow(Fixed):
        def _map(self, regions):
            if any(region.guest_address >= 1 << 32 for region in regions):
                raise OSError(22, "beyond what the IOMMU reaches")
            super()._map(regions)

    with logged(Narrow) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        assert "beyond what the IOMMU reaches" in device.marks_all
        lab.finish()
        assert device.below.queues[0].setup == lab.queue.setup
        device.suspend()
        first = lab.memory.guest_address // PAGE
        assert bitmap.pages() == set(range(first, first + MEMORY_BYTES // PAGE))
        device.set_dirty_log(None)
        assert device.marks_all == ""


def test_a_front_end_that_wants_a_log(tmp_path):
    """Through the exporter, as a VMM does it."""
    with loggable(Fixed.blk(DISK_BYTES, timeout_s=5)) as device, bridged(device) as front, ExitStack() as stack:
        assert Capability.DIRTY_LOG in front.capabilities
        lab = Lab(stack, front)
        bitmap = stack.enter_context(Bitmap(lab.memory))
        lab.finish()
        device.below.pages.clear()
        front.set_dirty_log(bitmap.log)
        assert isinstance(device._relay, Relay)
        lab.finish()
        front.suspend()
        assert device.below.pages & pages_of(lab.memory) <= bitmap.pages()
        front.set_dirty_log(None)
        front.resume()
        lab.finish()
        assert device._relay is None


class Busy(Unlogged):
    """No SUSPEND either."""

    lacks = Unresumable.lacks | {Capability.SUSPEND, Capability.DEVICE_STATE}


def test_a_disk_without_suspend():
    """It is drained to be given the shadow rings; from then on it can be drained whatever the guest does."""
    with loggable(suspendable(Busy.blk(DISK_BYTES, timeout_s=5))) as device, ExitStack() as stack:
        assert Drained in device
        lab = Lab(stack, device)
        bitmap = stack.enter_context(Bitmap(lab.memory))
        lab.finish()
        device.set_dirty_log(bitmap.log)
        assert device.marks_all == ""
        lab.finish()
        for block in range(20):
            lab.disk.write(block)
        lab.queue.kick()
        device.suspend()
        assert device.below.below.pages & pages_of(lab.memory) <= bitmap.pages()
        resume(device)
        lab.finish()


def test_a_guest_that_leaves_no_pause_is_not_refused_a_log():
    with loggable(suspendable(Busy.blk(DISK_BYTES, timeout_s=5))) as device, ExitStack() as stack:
        lab = Lab(stack, device)
        bitmap = stack.enter_context(Bitmap(lab.memory))
        lab.finish()
        device.below.below.faults.latency_s = 3
        lab.disk.write(1)
        device.timeout_s = 1
        device.set_dirty_log(bitmap.log)
        assert "1 requests on queue 0 are not answered" in device.marks_all
        device.below.below.faults.latency_s = 0
        device.timeout_s = 10
        lab.finish()
        device.suspend()
        assert len(bitmap.pages()) == MEMORY_BYTES // PAGE


def test_a_chain_that_cannot_be_followed_marks_everything_when_it_stops():
    """The device has understood it somehow, or not: nobody knows what it wrote."""
    with logged(Fixed) as (device, lab, bitmap):
        lab.finish()
        device.set_dirty_log(bitmap.log)
        relayed = device._relay.queues[0].ring
        relayed._mark(lab.queue.size)
        assert "descriptor 256 of a table of 256" in relayed.incomplete
        device.suspend()
        assert len(bitmap.pages()) == MEMORY_BYTES // PAGE


def test_a_guest_that_breaks_its_ring_gets_an_error_and_nothing_more():
    with logged(Fixed) as (device, lab, bitmap):
        lab.finish()
        err = os.eventfd(0, os.EFD_NONBLOCK)
        device.set_err(0, err)
        device.set_dirty_log(bitmap.log)
        lab.queue._avail[1] = (lab.queue.avail_index + 1000) & 0xFFFF
        lab.queue.kick()
        deadline = time.monotonic() + 5
        while not device._relay.queues[0].broken and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "the available index went from" in device._relay.queues[0].broken
        assert os.eventfd_read(err) == 1
        assert device.state is RunState.RUNNING
        device.suspend()
        os.close(err)


def test_memory_that_comes_and_goes_while_a_log_is_kept():
    with logged(Fixed) as (device, lab, bitmap), GuestMemory(1 << 20, 0x4000_0000) as more:
        device.set_dirty_log(bitmap.log)
        device.map([more.region])
        lab.finish()
        assert len(device._relay._guest._mapped) == 2
        device.unmap([more.region])
        assert len(device._relay._guest._mapped) == 1
        lab.disk.verify()


def test_a_log_that_does_not_fit_its_file_is_refused():
    with logged(Fixed) as (device, lab, bitmap):
        with pytest.raises(OSError, match="of a file of"):
            device.set_dirty_log(DirtyLog(bitmap.fd, bitmap.size_bytes + 1))
        lab.finish()


def test_a_reset_ends_the_log():
    with logged(Fixed) as (device, _, bitmap):
        device.set_dirty_log(bitmap.log)
        device.reset()
        assert (device._relay, device.dirty_log) == (None, None)
        assert [thread.name for thread in threading.enumerate() if "relay" in thread.name] == []


@pytest.mark.parametrize("cls", KINDS)
def test_what_a_device_has_used_without_a_call_is_there_when_it_is_stopped(cls):
    class Silent(cls):
        silent = False

        def _bind_eventfd(self, operation, index, eventfd):
            if not (self.silent and operation is Operation.SET_CALL):
                super()._bind_eventfd(operation, index, eventfd)

    with logged(Silent) as (device, lab, bitmap):
        lab.finish()
        device.below.silent = True
        device.below.faults.latency_s = 0.2  # it answers while it is being stopped
        device.set_dirty_log(bitmap.log)
        lab.disk.write(3)
        lab.queue.kick()
        deadline = time.monotonic() + 5
        while not device.below._engine._due and time.monotonic() < deadline:
            time.sleep(0.001)
        device.suspend()
        assert lab.queue.device_used_index == lab.queue.avail_index
        assert device.get_base(0) == SplitBase(lab.queue.device_used_index)


def test_a_kick_that_only_the_relay_has_seen_is_not_lost():
    with logged(Fixed) as (device, lab, bitmap):
        lab.finish()
        device.set_dirty_log(bitmap.log)
        with device._relay.holding():
            pass
        lab.disk.write(1)
        signals = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vdpabridge.layers.logged.signal", signals.append)
            device.set_dirty_log(None)
        assert signals == [device.queues[0].eventfds[Operation.SET_KICK]]
        lab.finish()


def test_a_queue_that_is_enabled_while_a_log_is_kept():
    with loggable(Fixed.blk(DISK_BYTES, timeout_s=5)) as device, ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
        queues = [stack.enter_context(SplitQueue(memory, 64)) for _ in range(2)]
        device.map([memory.region])
        device.accept_features(VERSION_1)
        for index, queue in enumerate(queues):
            device.set_queue(index, queue.setup)
            device.set_call(index, queue.call_fd)
            device.set_kick(index, queue.kick_fd)
        device.enable_queue(0)
        device.start()
        log = memory_file("log", (memory.guest_address + MEMORY_BYTES) // PAGE // 8)
        stack.callback(os.close, log)
        device.set_dirty_log(DirtyLog(log, os.fstat(log).st_size))
        assert device.marks_all == ""
        disk = KnownDisk(BlockDriver(memory, queues[1]))
        disk.write(1)
        queues[1].kick()
        device.enable_queue(1)
        disk.settle(disk.driver.drain())
        assert disk.verify() == 1


def test_a_device_whose_position_is_not_its_used_index_keeps_the_guests_ring():
    """It has requests that it took and did not answer; on a ring of ours it would not know them."""

    class Ahead(Fixed):
        def _get_base(self, index):
            return SplitBase((super()._get_base(index).avail_index + 1) & 0xFFFF)

    with logged(Ahead) as (device, lab, bitmap):
        lab.finish()
        device.set_dirty_log(bitmap.log)
        assert "queue 0 stands at" in device.marks_all
        assert device.below.queues[0].setup == lab.queue.setup
        device.suspend()
        assert len(bitmap.pages()) == MEMORY_BYTES // PAGE


def test_state_that_a_reset_would_lose_is_not_reset_for_a_log(monkeypatch):
    with logged(Fixed) as (device, lab, bitmap):
        monkeypatch.setattr("vdpabridge.layers.shadows.unsavable", lambda _: [Loss.CONTROL_QUEUE])
        lab.finish()
        device.set_dirty_log(bitmap.log)
        assert device.marks_all == "control-queue would be lost by a reset"
        lab.finish()
        device.suspend()
        assert len(bitmap.pages()) == MEMORY_BYTES // PAGE
