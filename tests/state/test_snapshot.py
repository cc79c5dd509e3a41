"""Snapshots: what is carried, what is refused before the device is touched, what a failure leaves."""

from contextlib import contextmanager

import pytest

from vdpabridge.device import RunState, SplitBase
from vdpabridge.device.rules import Capability, Operation
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import FeatureError, KernelError, StateError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.replay import resume
from vdpabridge.state.snapshot import QueueEventfds, SnapshotError, capture, place, prepare, restore

from ..support.fake_kernel import FakeKernel, Parent
from ..support.transitions import eventfd

NODE = "/dev/vhost-vdpa-0"


@contextmanager
def suspended(parent=None):
    """(snapshot, queue) of a device with queue 1 at 77."""
    kernel = FakeKernel(parent)
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, VhostVdpa.open(NODE, system=kernel) as device:
        device.accept_features(1 << 32)
        queue.attach(device, 1)
        device.start()
        device.suspend()
        kernel.bases[1] = 77
        yield capture(device), queue


@contextmanager
def destination(parent=None):
    kernel = FakeKernel(parent)
    with VhostVdpa.open(NODE, system=kernel) as device:
        yield kernel, device


def test_everything_is_carried():
    with suspended() as (snapshot, queue), destination() as (kernel, device):
        assert snapshot.queues[1].base == SplitBase(77)
        assert snapshot.config == bytes(range(64))
        restore(device, snapshot, {1: QueueEventfds(queue.kick_fd, queue.call_fd)})
        assert device.state is RunState.CONFIGURED
        assert kernel.bases[1] == 77
        device.start()
        assert kernel.enabled == {0: False, 1: True}


def test_a_device_in_use_is_not_restored_into():
    """It would be reset on the way out, and somebody's guest with it."""
    with suspended() as (snapshot, _), destination() as (kernel, device):
        device.accept_features(1 << 32)
        device.start()
        kernel.log.clear()
        with pytest.raises(StateError, match="restore: not while the device is running"):
            restore(device, snapshot, {})
        assert device.state is RunState.RUNNING
        assert kernel.log == []


@pytest.mark.parametrize(
    ("parent", "error", "words"),
    [
        (Parent(device_id=1), SnapshotError, "the snapshot is of device id 2, this is 1"),
        (Parent(queues=1), SnapshotError, "the snapshot has queue 1, and the device has 1"),
        (Parent(queue_size_max=32), SnapshotError, "queue 1 has 64 descriptors, the device has at most 32"),
        (Parent(features=1 << 33), FeatureError, "needs bits 0x100000000"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_device_is_touched(parent, error, words):
    with suspended() as (snapshot, _), destination(parent) as (kernel, device):
        kernel.log.clear()
        with pytest.raises(error, match=words):
            restore(device, snapshot, {})
        assert not [name for name in kernel.log if "SET" in name]
        assert device.state is RunState.RESET


def test_a_step_that_fails_leaves_a_reset_device():
    with suspended() as (snapshot, _), destination(Parent(set_base="initial-only")) as (kernel, device):
        with pytest.raises(KernelError, match="only start a queue at its beginning"):
            restore(device, snapshot, {})
        assert device.state is RunState.RESET
        assert kernel.status == 0


def test_resume_prefers_the_devices_own():
    kernel = FakeKernel()
    with VhostVdpa.open(NODE, system=kernel) as device:
        device.accept_features(1 << 32)
        device.start()
        device.suspend()
        assert resume(device) is Capability.RESUME
        assert not kernel.suspended


def test_eventfds_are_given_when_it_is_their_time():
    """All but the kick before the positions are known: a kick is the other device's until then."""
    with suspended() as (snapshot, queue), destination() as (_, device), eventfd() as err:
        wires = {1: QueueEventfds(queue.kick_fd, queue.call_fd, err)}
        prepare(device, snapshot, wires)
        assert set(device.queues[1].eventfds) == {Operation.SET_CALL, Operation.SET_ERR}
        place(device, snapshot, wires)
        assert set(device.queues[1].eventfds) == {Operation.SET_CALL, Operation.SET_ERR, Operation.SET_KICK}
