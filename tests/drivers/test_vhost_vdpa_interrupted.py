"""What the vhost-vdpa driver believes of a device after requests that were interrupted, late or refused.

Such a request may have been done. What the driver believes then is safe: a device may run, and one that was not reset
to the end is of no use until it is.
"""

import errno
import os
import signal
from contextlib import contextmanager

import pytest

from vdpabridge.device import Operation, RunState, records as device_core
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import DeviceFailed, KernelError, StateError, VdpaBridgeError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.procedures import migrate, save
from vdpabridge.state.procedures.outcome import Advice, ProcedureFailed
from vdpabridge.state.replay import ReplayFailed, resume
from vdpabridge.state.snapshot import capture

from ..support.disk_lab import limits
from ..support.fake_kernel import FakeKernel, Parent
from ..support.transitions import shared_file
from ..support.unlucky import ACCIDENTS, Unlucky, interrupted, late, refused
from ..support.waiting import wait_until

NODE = "/dev/vhost-vdpa-0"
VERSION_1 = 1 << 32
STATUS, RESUME, SET_FEATURES = "VHOST_VDPA_SET_STATUS", "VHOST_VDPA_RESUME", "VHOST_SET_FEATURES"


@contextmanager
def at_work(kernel, timeout_s=5, *, base=7):
    """A device that runs, its queue at ``base``."""
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 256) as queue,
        VhostVdpa.open(NODE, system=kernel, timeout_s=timeout_s) as device,
    ):
        device.map([memory.region])
        device.accept_features(VERSION_1)
        queue.attach(device, 0)
        device.start()
        kernel.bases[0] = base
        yield device, memory


def has_an_accident(device, act):
    """``act`` does not come to its end; when this returns, the kernel is done with it."""
    with pytest.raises((VdpaBridgeError, KeyboardInterrupt)) as caught:
        act()
    wait_until(lambda: not device._node.stuck)
    device.timeout_s = 5
    return caught.value


# --- resets ---


@pytest.mark.parametrize("state", [RunState.RESET, RunState.CONFIGURED, RunState.RUNNING, RunState.SUSPENDED])
@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_reset_that_was_not_seen_to_its_end_makes_the_device_useless_until_another(accident, state):
    kernel = Unlucky(Parent(persist=False, forgets_maps=True))
    with GuestMemory(1 << 20) as memory, VhostVdpa.open(NODE, system=kernel, timeout_s=5) as device:
        device.map([memory.region])
        if state is not RunState.RESET:
            device.accept_features(VERSION_1)
        if state in (RunState.RUNNING, RunState.SUSPENDED):
            device.start()
        if state is RunState.SUSPENDED:
            device.suspend()
        device.timeout_s = 0.1
        kernel.accidents = [(STATUS, 0, ACCIDENTS[accident])]
        has_an_accident(device, device.reset)
        assert device.state is RunState.FAILED
        assert device.failure.startswith("a reset did not complete")
        for operation in (lambda: device.accept_features(VERSION_1), device.start, device.resume):
            with pytest.raises((DeviceFailed, StateError)):
                operation()
        device.reset()
        device.accept_features(VERSION_1)
        device.start()
        assert kernel.device_maps == {0: {memory.guest_address: 1 << 20}}


def test_a_migration_again_after_the_destination_could_not_be_reset():
    """As its error advises; the destination has no memory, and is not started."""
    parent = Parent(persist=False, forgets_maps=True)
    there = Unlucky(parent)
    with (
        at_work(Unlucky(parent)) as (source, memory),
        VhostVdpa.open(NODE, system=there, timeout_s=5) as destination,
    ):
        destination.map([memory.region])
        destination.timeout_s = 0.1

        def refuse_and_wait():
            there.accidents = [(STATUS, 0, lambda: there.accidents.append((STATUS, 0, late)))]
            refused()

        there.accidents = [(SET_FEATURES, None, refuse_and_wait)]
        failed = has_an_accident(destination, lambda: migrate(source, destination, limits()))
        assert (failed.advice, source.state, destination.state) == (
            Advice.OTHER_DESTINATION,
            RunState.RUNNING,
            RunState.FAILED,
        )
        with pytest.raises(StateError):
            migrate(source, destination, limits())
        destination.reset()
        migrate(source, destination, limits())
        assert there.device_maps == {0: {memory.guest_address: 1 << 20}}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_replay_whose_reset_fails_is_never_resumed_from_the_beginning(accident):
    """Its queue stood at 7. Nothing reads that from the device any more: the snapshot has it."""
    kernel = Unlucky(Parent(resume="no"))
    with at_work(kernel) as (device, _):
        device.suspend()
        device.timeout_s = 0.1
        kernel.accidents = [(STATUS, 0, ACCIDENTS[accident])]
        failed = has_an_accident(device, lambda: resume(device))
        assert device.state is RunState.FAILED
        if isinstance(failed, ReplayFailed):
            assert failed.snapshot.queues[0].base.avail_index == 7
        with pytest.raises((DeviceFailed, StateError)):
            resume(device)


def test_advice_after_a_save_whose_replay_fails():
    kernel = Unlucky(Parent(resume="no"))
    with at_work(kernel, timeout_s=0.2) as (device, _), shared_file(0) as file:
        kernel.accidents = [(STATUS, 0, late)]
        failed = has_an_accident(device, lambda: save(device, file, limits()))
        assert isinstance(failed, ProcedureFailed)
        assert failed.advice is not Advice.RESUME
        assert failed.snapshot.queues[0].base.avail_index == 7


def test_a_device_that_was_reset_behind_our_back_has_no_snapshot():
    kernel = Unlucky()
    with at_work(kernel) as (device, _):
        device.suspend()
        kernel.status = 0
        with pytest.raises(DeviceFailed, match="status is reset"):
            capture(device)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("what", ["resume", "save"])
def test_an_interruption_keeps_where_the_queues_stood(what, times):
    """Nobody else knows it: the replay has reset the device, and failed."""
    kernel = Unlucky(Parent(resume="no"))
    with at_work(kernel) as (device, _), shared_file(0) as file:
        if what == "resume":
            device.suspend()

        def interrupt_and_refuse():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            kernel.accidents = [("VHOST_SET_VRING_BASE", None, refused)]

        kernel.accidents = [(STATUS, 0, interrupt_and_refuse)]
        acts = {"resume": lambda: resume(device), "save": lambda: save(device, file, limits())}
        with pytest.raises(KeyboardInterrupt) as caught:
            acts[what]()
        assert caught.value.snapshot.queues[0].base.avail_index == 7
        assert device.state is not RunState.RUNNING
        assert len(caught.value.__notes__) == 1


def test_a_replay_without_descriptors_left_keeps_where_the_queues_stood():
    kernel = Unlucky(Parent(resume="no"))
    with at_work(kernel) as (device, _):
        device.suspend()
        device._bind_eventfd = lambda *_words: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files"))
        with pytest.raises(ReplayFailed, match="Too many open files") as caught:
            resume(device)
        assert caught.value.snapshot.queues[0].base.avail_index == 7
        del device._bind_eventfd


@pytest.mark.parametrize("act", ["reset", "close"])
def test_a_reset_that_is_interrupted_while_it_closes_descriptors_can_be_done_again(act, monkeypatch):
    """Each is closed once: its number may be somebody else's by then."""
    kernel = Unlucky()
    real = os.close
    closed = []

    def close(fd):
        real(fd)
        closed.append(fd)
        if len(closed) == 2:
            raise KeyboardInterrupt

    with at_work(kernel) as (device, _):
        device.set_call(1, device.queues[0].eventfds[Operation.SET_KICK])
        monkeypatch.setattr(device_core.os, "close", close)
        with pytest.raises(KeyboardInterrupt):
            getattr(device, act)()
        monkeypatch.undo()
        device.close() if act == "close" else device.reset()
        assert len(closed) == len(set(closed))
        assert not kernel._running
        if act == "reset":
            device.accept_features(VERSION_1)


# --- starts and resumes ---


@pytest.mark.parametrize("timeout_s", [None, 5])
@pytest.mark.parametrize("act", ["start", "resume"])
def test_a_device_that_may_run_is_taken_for_one_that_does_also_after_two_interruptions(act, timeout_s):
    """The second comes while it is asked whether it does."""
    kernel = Unlucky()
    with at_work(kernel, timeout_s) as (device, _):
        device.suspend()
        if act == "start":
            device.reset()
            device.accept_features(VERSION_1)
        request = (STATUS, 15) if act == "start" else (RESUME, None)

        def twice():
            # not before: the status is looked at first, too
            kernel.accidents.append(("VHOST_VDPA_GET_STATUS", None, interrupted))
            interrupted()

        kernel.accidents = [(*request, twice)]
        with pytest.raises(KeyboardInterrupt):
            getattr(device, act)()
        assert (kernel.status, kernel.suspended, device.state) == (15, False, RunState.RUNNING)


@pytest.mark.parametrize("timeout_s", [None, 5])
def test_features_again_after_an_interruption(timeout_s):
    kernel = Unlucky()
    with VhostVdpa.open(NODE, system=kernel, timeout_s=timeout_s) as device:
        kernel.accidents = [(SET_FEATURES, None, interrupted)]
        with pytest.raises(KeyboardInterrupt):
            device.accept_features(VERSION_1)
        device.accept_features(VERSION_1)
        assert (device.state, kernel.status) == (RunState.CONFIGURED, 11)


def test_an_eventfd_that_the_kernel_does_not_take_at_all_is_not_taken_away():
    """A kernel without that request is not asked again at every reset."""

    class Old(FakeKernel):
        def vhost_vdpa_set_config_call(self, _argument):
            return errno.ENOTTY

    eventfd = os.eventfd(0)
    with VhostVdpa.open(NODE, system=Old()) as device:
        device.accept_features(VERSION_1)
        with pytest.raises(KernelError):
            device.set_config_call(eventfd)
        device.reset()
        assert device.state is RunState.RESET
    os.close(eventfd)


@pytest.mark.parametrize("accident", ACCIDENTS)
@pytest.mark.parametrize("what", ["set_kick", "set_call", "set_config_call"])
def test_an_eventfd_that_the_kernel_may_have_is_taken_away_by_a_reset(what, accident):
    kernel = Unlucky()
    requests = {"set_kick": "VHOST_SET_VRING_KICK", "set_call": "VHOST_SET_VRING_CALL"}
    eventfd = os.eventfd(0)
    with VhostVdpa.open(NODE, system=kernel, timeout_s=5) as device:
        device.accept_features(VERSION_1)
        device.timeout_s = 0.1
        kernel.accidents = [(requests.get(what, "VHOST_VDPA_SET_CONFIG_CALL"), None, ACCIDENTS[accident])]
        words = [eventfd] if what == "set_config_call" else [0, eventfd]
        has_an_accident(device, lambda: getattr(device, what)(*words))
        device.reset()
        assert set(kernel.eventfds.values()) == {-1}
    os.close(eventfd)


# --- starts ---


@pytest.mark.parametrize("what", ["VHOST_VDPA_SET_VRING_ENABLE", STATUS])
@pytest.mark.parametrize("then", ["disabled", "elsewhere"])
def test_what_a_start_that_failed_has_enabled_is_not_enabled_by_the_next(what, then):
    """And takes its place anew, if it is: a queue takes its addresses when it is enabled."""
    kernel = Unlucky(Parent(queues=2))
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 256) as first,
        SplitQueue(memory, 256) as second,
        VhostVdpa.open(NODE, system=kernel, timeout_s=5) as device,
    ):
        device.map([memory.region])
        device.accept_features(VERSION_1)
        first.attach(device, 0)
        second.attach(device, 1)

        def undone():
            kernel.status &= ~4
            refused()

        kernel.accidents = [(what, 1, refused) if what != STATUS else (what, 15, undone)]
        with pytest.raises((KernelError, DeviceFailed)):
            device.start()
        assert (device.state, kernel.enabled[0]) == (RunState.CONFIGURED, True)
        if then == "disabled":
            device.enable_queue(0, False)
        since = len(kernel.log)
        device.start()
        assert kernel.enabled == {0: then == "elsewhere", 1: True}
        # disabled in between
        assert kernel.log[since:].count("VHOST_VDPA_SET_VRING_ENABLE") == (3 if then == "disabled" else 4)
        device.reset()
        device.accept_features(VERSION_1)
        first.attach(device, 0)
        since = len(kernel.log)
        device.start()
        assert kernel.log[since:].count("VHOST_VDPA_SET_VRING_ENABLE") == 1, "a reset has forgotten it"
