"""What goes wrong while a dirty log is kept, begins or ends: the device works on, or has failed and says so.

Whatever happens, the log has every page that was written when `suspend` returns.
"""

import dataclasses
import os
import signal
import threading
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.abi.virtio_ring import VRING_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from vdpabridge.device import MemoryRegion, RunState, SplitBase
from vdpabridge.errors import DeadlineExceeded, DeviceFailed, KernelError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.layers import loggable
from vdpabridge.layers.arena import _PLACES
from vdpabridge.state.replay import resume

from ..support.dirty_log import Bitmap, pages_of
from ..support.disk_lab import DISK_BYTES, MEMORY_BYTES, VERSION_1, Lab
from ..support.pair import bridged
from ..support.unlogged import Fixed, Unlogged, Unresumable
from ..support.waiting import wait_until
from .test_logged import KINDS, logged


def is_complete(device, lab, bitmap):
    """Whether every page of the guest's that the device has written is marked."""
    return device.below.pages & pages_of(lab.memory) <= bitmap.pages()


def all_is_marked(lab, bitmap):
    return bitmap.pages() == pages_of(lab.memory)


def once(cls, hook, error):
    """Devices whose ``hook`` raises ``error`` when it is asked for the first time after `failing` was set."""

    class Once(cls):
        failing = False

    def method(self, *words, **options):
        if self.failing:
            self.failing = False
            raise error
        return getattr(super(Once, self), hook)(*words, **options)

    setattr(Once, hook, method)
    return Once


# --- memory ---


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("through", ["the library", "vhost-user"])
def test_a_ring_whose_memory_goes_and_comes_again(cls, through):
    with loggable(cls.blk(DISK_BYTES, timeout_s=5)) as device, ExitStack() as stack:
        user = stack.enter_context(bridged(device)) if through == "vhost-user" else device
        lab = Lab(stack, user)
        bitmap = stack.enter_context(Bitmap(lab.memory))
        lab.finish()
        user.set_dirty_log(bitmap.log)
        for _ in range(2):
            user.unmap([lab.memory.region])
            user.map([lab.memory.region])
            lab.finish()
        user.suspend()
        assert is_complete(device, lab, bitmap)
        assert device.marks_all == ""


def test_a_device_that_used_more_of_a_ring_that_is_gone():
    with logged(Fixed) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        lab.finish()
        device.below.faults.latency_s = 0.1
        lab.disk.write(1)
        lab.queue.kick()
        wait_until(lambda: device.below._engine._due)
        # of the relay only: a device whose ring has no memory could not use anything
        device._relay.unmap([lab.memory.region])
        device.suspend()
        assert "the ring is not mapped" in device.marks_all
        assert all_is_marked(lab, bitmap)
        device._relay.map([lab.memory.region])
        resume(device)
        lab.finish()


def test_an_unmap_that_the_device_refuses():
    error = KernelError(22, "VHOST_IOTLB_INVALIDATE", device="disk")
    with logged(once(Fixed, "_unmap", error)) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        device.below.failing = True
        with pytest.raises(KernelError):
            device.unmap([lab.memory.region])
        lab.finish()
        device.suspend()
        assert is_complete(device, lab, bitmap)


def test_memory_in_another_address_space_is_not_the_guests_rings():
    class Two(Fixed):
        address_space_count = 2

        def _map(self, regions):
            super()._map([region for region in regions if region.address_space == 0])

        def _unmap(self, regions):
            super()._unmap([region for region in regions if region.address_space == 0])

    with logged(Two) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        other = dataclasses.replace(lab.memory.region, address_space=1)
        device.map([other])
        device.unmap([other])
        lab.finish()
        device.suspend()
        assert is_complete(device, lab, bitmap)


def test_the_arenas_place_is_free_when_the_log_has_ended():
    with logged(Fixed) as (device, lab, bitmap), GuestMemory(1 << 20) as more:
        device.set_dirty_log(bitmap.log)
        device.set_dirty_log(None)
        assert len(device.below.regions) == 1
        device.map([MemoryRegion(_PLACES[0], 1 << 20, more.region.fd)])
        device.set_dirty_log(bitmap.log)
        assert device.marks_all == ""
        lab.finish()


@pytest.mark.parametrize("again", ["log", "none"])
def test_a_device_that_does_not_give_the_arena_back(again):
    error = KernelError(22, "VHOST_IOTLB_INVALIDATE", device="disk")
    with logged(once(Fixed, "_unmap", error)) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        device.below.failing = True
        device.set_dirty_log(None)
        lab.finish()
        if again == "log":
            device.set_dirty_log(bitmap.log)
            assert device.marks_all == ""
            lab.finish()


# --- guests that break the rules ---


def swapped(lab, head, address, size_bytes):
    """The guest makes another chain of one that the device has."""
    VRING_DESC.struct.pack_into(lab.queue._desc, head * 16, address, size_bytes, VRING_DESC_F_INDIRECT, 0)


def test_a_chain_without_an_end_does_not_keep_the_relay():
    """A table of four million descriptors, each for all of the memory."""
    with logged(Fixed) as (device, lab, bitmap), GuestMemory(64 << 20, 1 << 32) as table:
        device.set_dirty_log(bitmap.log)
        device.map([table.region])
        flags = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE
        table.view[:] = VRING_DESC.pack(lab.memory.guest_address, MEMORY_BYTES, flags, 0) * (len(table.view) // 16)
        lab.finish()
        device.below.faults.latency_s = 0.1
        lab.disk.write(1)
        lab.queue.kick()
        wait_until(lambda: device.below._engine._due)
        swapped(lab, next(iter(lab.queue._chains)), table.guest_address, len(table.view))
        # it takes minutes to follow
        device.suspend()
        assert device.marks_all == "a chain of more than 1024 descriptors"
        assert pages_of(lab.memory) <= bitmap.pages()


def test_what_was_used_is_shown_to_a_guest_that_breaks_its_ring():
    with logged(Fixed) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        device.below.pages.clear()
        lab.finish()
        device.below.faults.latency_s = 0.1
        lab.disk.write(1)
        lab.queue.kick()
        wait_until(lambda: device.below._engine._due)
        used = lab.queue.device_used_index
        lab.queue._avail[1] = (lab.queue.avail_index + 1000) & 0xFFFF
        lab.queue.kick()
        wait_until(lambda: device._relay.queues[0].broken)
        wait_until(lambda: lab.queue.device_used_index == used + 1)
        device.suspend()
        assert is_complete(device, lab, bitmap)


# --- devices that fail ---


@pytest.mark.parametrize("how", ["suspend", "the log ends", "check"])
def test_a_device_that_uses_what_it_was_not_given_has_failed(how):
    with logged(Fixed) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        lab.finish()
        queue = device._relay.queues[0]
        queue.ring._used_words[1] = (queue.ring._used_words[1] + 7) & 0xFFFF
        os.eventfd_write(queue.from_device, 1)
        wait_until(lambda: device._relay.failed)
        step = {"suspend": device.suspend, "the log ends": lambda: device.set_dirty_log(None)}.get(
            how, device.check_health
        )
        with pytest.raises(DeviceFailed, match="the relay of its rings has failed: the used index went from"):
            step()
        assert device.state is RunState.FAILED
        if how != "check":
            assert all_is_marked(lab, bitmap)
        device.reset()
        assert device._relay is None
        device.accept_features(VERSION_1)
        lab.queue.attach(device, 0, lab.queue.device_used_index)
        device.start()
        lab.finish()


def test_a_log_whose_file_is_cut_fails_the_device():
    with logged(Fixed) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        lab.finish()
        os.ftruncate(bitmap.fd, 0)
        lab.disk.write(1)
        lab.queue.kick()
        wait_until(lambda: device._relay.failed)
        with pytest.raises(DeviceFailed, match="its dirty log does not take what is not in it"):
            device.suspend()
        device.reset()


READS = {
    "_get_base": KernelError(5, "VHOST_GET_VRING_BASE", device="disk"),
    "_read_config": DeadlineExceeded("VHOST_VDPA_GET_CONFIG", 3, device="disk"),
    "_check_health": KernelError(5, "VHOST_VDPA_GET_STATUS", device="disk"),
}


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("hook", READS)
def test_one_read_that_fails_does_not_stop_it(cls, hook):
    with logged(once(cls, hook, READS[hook])) as (device, lab, bitmap):
        lab.finish()
        device.below.failing = True
        device.set_dirty_log(bitmap.log)
        assert not device.below.failing
        assert (device.state, device.below.state) == (RunState.RUNNING, RunState.RUNNING)
        lab.finish()
        device.suspend()
        assert is_complete(device, lab, bitmap)
        resume(device)
        device.set_dirty_log(None)
        lab.finish()
        device.set_dirty_log(bitmap.log)
        device.below.failing = True
        device.set_dirty_log(None)
        assert (device.state, device.below.state) == (RunState.RUNNING, RunState.RUNNING)
        lab.finish()


STEPS = (
    "_suspend",
    "_set_queue",
    "_set_base",
    "_bind_eventfd",
    "_enable_queue",
    "_start",
    "_resume",
    "_accept_features",
    "_reset",
)


@pytest.mark.parametrize("cls", [Unlogged, Fixed, Unresumable])
@pytest.mark.parametrize("hook", STEPS)
@pytest.mark.parametrize("when", ["it begins", "it ends"])
def test_one_step_that_fails(cls, hook, when):
    """The device works on, or has failed, as it says; a reset mends it."""
    with logged(once(cls, hook, KernelError(5, "a request", device="disk"))) as (device, lab, bitmap):
        lab.finish()
        if when == "it ends":
            device.set_dirty_log(bitmap.log)
        device.below.failing = True
        try:
            device.set_dirty_log(bitmap.log if when == "it begins" else None)
        except DeviceFailed:
            assert hook in ("_accept_features", "_reset"), "what is given to it can be given to it again"
            assert device.state is RunState.FAILED
            device.below.failing = False
            device.reset()
            device.accept_features(VERSION_1)
            lab.queue.attach(device, 0, lab.queue.device_used_index)
            device.start()
        device.below.failing = False
        assert device.state is RunState.RUNNING
        lab.finish()
        if device.dirty_log is not None:
            device.below.pages.clear()
            lab.finish()
            device.suspend()
            assert is_complete(device, lab, bitmap)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("when", ["running", "before the start"])
def test_a_device_that_refuses_the_shadow_rings_works_on_the_guests(cls, when):
    class Narrow(cls):
        def _set_queue(self, index, setup):
            if setup.used_address >= 1 << 32:
                raise KernelError(22, "VHOST_SET_VRING_ADDR", device=self.name)
            super()._set_queue(index, setup)

    with logged(Narrow) as (device, lab, bitmap):
        lab.finish()
        if when == "before the start":
            device.reset()
            device.accept_features(VERSION_1)
            lab.queue.attach(device, 0, lab.queue.device_used_index)
        device.set_dirty_log(bitmap.log)
        if when == "before the start":
            device.start()
        assert "VHOST_SET_VRING_ADDR" in device.marks_all
        assert device.below.queues[0].setup == lab.queue.setup
        assert device._relay is None
        lab.finish()
        device.suspend()
        assert all_is_marked(lab, bitmap)
        assert device.get_base(0) == SplitBase(lab.queue.device_used_index)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("when", ["running", "before the start"])
def test_no_thread_for_a_relay(cls, when, monkeypatch):
    with logged(cls) as (device, lab, bitmap):
        lab.finish()
        if when == "before the start":
            device.reset()
            device.accept_features(VERSION_1)
            lab.queue.attach(device, 0, lab.queue.device_used_index)
        begin = threading.Thread.start

        def start(self):
            if "relay" in self.name:
                raise RuntimeError("can't start new thread")
            begin(self)

        monkeypatch.setattr(threading.Thread, "start", start)
        device.set_dirty_log(bitmap.log)
        if when == "before the start":
            device.start()
        assert "can't start new thread" in device.marks_all
        lab.finish()
        device.suspend()
        assert all_is_marked(lab, bitmap)


# --- a relay that does not end ---


@contextmanager
def stuck(device):
    """The relay's thread does not come to an end, and nobody has patience."""
    gate = threading.Event()
    device._relay._thread.leave(gate.wait)
    device.timeout_s = 0.1
    try:
        yield
    finally:
        device.timeout_s = 5
        gate.set()


def test_a_reset_that_the_relay_does_not_follow_can_be_repeated():
    with logged(Fixed) as (device, lab, bitmap):
        lab.finish()
        device.set_dirty_log(bitmap.log)
        with stuck(device):
            with pytest.raises(DeadlineExceeded, match="the relay of its rings does not come to an end"):
                device.reset()
            assert device.state is RunState.FAILED
            assert device._relay is not None
        device.reset()
        assert (device.state, device._relay) == (RunState.RESET, None)


def test_a_device_is_not_given_up_for_certain_as_long_as_its_relay_works():
    with logged(Fixed) as (device, lab, bitmap):
        lab.finish()
        device.set_dirty_log(bitmap.log)
        with stuck(device):
            assert device.give_up() is False
        device._end_relay()
        device._shadows.drop()


# --- what the user does ---


@pytest.mark.parametrize("setter", ["set_kick", "set_call", "set_err"])
def test_what_is_not_an_eventfd_is_refused(setter):
    with logged(Fixed) as (device, lab, bitmap):
        device.set_dirty_log(bitmap.log)
        reader, writer = os.pipe()
        before = dict(device._relay.queues[0]._guest)
        with pytest.raises(ValueError, match="is not an eventfd"):
            getattr(device, setter)(0, reader)
        assert device._relay.queues[0]._guest == before
        os.close(reader)
        os.close(writer)
        lab.finish()


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("hook", ["_suspend", "_get_base", "_set_queue", "_enable_queue"])
@pytest.mark.parametrize("when", ["it begins", "it ends"])
def test_an_interruption_waits_until_the_device_runs_again(cls, hook, when):
    class Interrupted(cls):
        armed = False

    def method(self, *words, **options):
        if self.armed:
            self.armed = False
            os.kill(os.getpid(), signal.SIGINT)
        return getattr(super(Interrupted, self), hook)(*words, **options)

    setattr(Interrupted, hook, method)
    with logged(Interrupted) as (device, lab, bitmap):
        lab.finish()
        if when == "it ends":
            device.set_dirty_log(bitmap.log)
        device.below.armed = True
        with pytest.raises(KeyboardInterrupt):
            device.set_dirty_log(bitmap.log if when == "it begins" else None)
        assert (device.state, device.below.state) == (RunState.RUNNING, RunState.RUNNING)
        lab.finish()
        if when == "it ends":
            # who was interrupted does not know whether the log has ended, and its books say that it has not
            assert device.dirty_log is not None
            device.suspend()
            assert is_complete(device, lab, bitmap)
        else:
            device.set_dirty_log(None)
            lab.finish()


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("hook", ["_get_base", "_set_queue", "_enable_queue", "_start"])
@pytest.mark.parametrize("when", ["it begins", "it ends"])
def test_what_nobody_expects(cls, hook, when):
    """Whatever is raised: the device works, or has failed."""
    with logged(once(cls, hook, MemoryError())) as (device, lab, bitmap):
        lab.finish()
        if when == "it ends":
            device.set_dirty_log(bitmap.log)
        device.below.failing = True
        try:
            device.set_dirty_log(bitmap.log if when == "it begins" else None)
        except MemoryError:
            assert device.state is RunState.FAILED
            device.reset()
        else:
            assert hook == "_start"
            assert device.below.state is RunState.RUNNING
            lab.finish()


def test_a_change_of_the_log_that_is_interrupted():
    """The log that counts is the one before, and it has not been kept since."""
    with logged(Fixed) as (device, lab, bitmap), Bitmap(lab.memory) as other:
        device.set_dirty_log(bitmap.log)
        lab.finish()
        set_log = device._relay.set_log

        def interrupted(log):
            os.kill(os.getpid(), signal.SIGINT)
            set_log(log)

        device._relay.set_log = interrupted
        with pytest.raises(KeyboardInterrupt):
            device.set_dirty_log(other.log)
        device.below.pages.clear()
        lab.finish()
        device.suspend()
        assert is_complete(device, lab, bitmap)
