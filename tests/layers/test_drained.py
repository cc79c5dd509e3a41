"""A disk that cannot be suspended: it is drained and reset, and continues where its rings say."""

from contextlib import ExitStack, contextmanager
from errno import EIO, EOPNOTSUPP

import pytest

from vdpabridge.device import Capability, RunState, SplitBase
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import DeadlineExceeded, DeviceFailed, KernelError, MissingCapability
from vdpabridge.export.vhost_user import Server
from vdpabridge.layers import Drained, suspendable
from vdpabridge.state.procedures import migrate
from vdpabridge.state.replay import resume

from ..support.disk_lab import DISK_BYTES, Lab, limits
from ..support.pair import bridged

LACKS = {Capability.SUSPEND, Capability.RESUME, Capability.SETUP_WHILE_SUSPENDED, Capability.QUEUE_CONTROL}


class Unsuspendable(Sim):
    """As most hardware is behind vhost-vdpa."""

    @property
    def capabilities(self):
        return super().capabilities - LACKS - {Capability.DEVICE_STATE, Capability.DIRTY_LOG, Capability.SKIP_DRAIN}


@contextmanager
def drained(timeout_s=5):
    with suspendable(Unsuspendable.blk(DISK_BYTES, timeout_s=timeout_s)) as device:
        yield device


def test_who_gets_a_layer():
    with Sim.blk(DISK_BYTES) as disk:
        assert suspendable(disk) is disk
    with Unsuspendable.fs() as file_server:
        assert suspendable(file_server) is file_server, "a reset would end the sessions of its guest"
        with pytest.raises(ValueError, match="a device with id 26 cannot be drained"):
            Drained(file_server)
    with drained() as device:
        assert isinstance(device, Drained)
        assert Capability.SUSPEND in device.capabilities
        assert not {Capability.RESUME, Capability.SETUP_WHILE_SUSPENDED} & device.capabilities


class TakesNoPosition(Unsuspendable):
    def _set_base(self, index, base):
        if base != SplitBase(0):
            raise KernelError(EOPNOTSUPP, "VHOST_SET_VRING_BASE", device=self.name)
        super()._set_base(index, base)


def test_a_device_that_takes_no_position_cannot_continue():
    with suspendable(TakesNoPosition.blk(DISK_BYTES)) as disk:
        assert isinstance(disk, TakesNoPosition)
        assert (disk.state, disk.queues) == (RunState.RESET, {})


def test_a_device_that_is_not_returned_is_closed():
    class Broken(Unsuspendable):
        def _accept_features(self, features):
            raise OSError(EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        suspendable(Broken.blk(DISK_BYTES))


def test_it_stops_where_its_ring_says_and_continues_there():
    with drained() as device, ExitStack() as stack:
        lab = Lab(stack, device)
        for round_ in range(3):
            device.suspend()
            assert (device.state, device.below.state) == (RunState.SUSPENDED, RunState.RESET)
            assert device.get_base(0) == SplitBase(lab.queue.device_used_index)
            assert lab.queue.device_used_index == lab.queue.avail_index
            device.suspend()
            resume(device)
            assert device.state is RunState.RUNNING
            lab.finish()
            lab.disk.write(round_)
        lab.finish()


def test_nothing_is_done_while_it_is_suspended():
    with drained() as device, ExitStack() as stack:
        lab = Lab(stack, device)
        lab.finish()
        device.suspend()
        before = lab.queue.device_used_index
        lab.disk.write(1)
        lab.queue.kick()
        # eventfds are kept, and given to the device when it is set up again
        device.set_kick(0, lab.queue.kick_fd)
        device.set_call(0, lab.queue.call_fd)
        assert lab.queue.device_used_index == before
        assert device.get_base(0) == SplitBase(before)
        resume(device)
        lab.finish()


def test_what_does_not_answer_runs_on():
    with drained(timeout_s=0.2) as device, ExitStack() as stack:
        lab = Lab(stack, device)
        lab.finish()
        device.below.faults.latency_s = 0.5
        lab.disk.write(1)
        with pytest.raises(DeadlineExceeded, match="1 requests on queue 0 are not answered") as caught:
            device.suspend()
        assert "stop its guest first" in caught.value.hint
        assert (device.state, device.below.state) == (RunState.RUNNING, RunState.RUNNING)
        device.below.faults.latency_s = 0
        device.timeout_s = 5
        lab.finish()
        device.suspend()
        assert device.state is RunState.SUSPENDED


def test_a_request_that_comes_at_the_last_moment_is_not_lost(monkeypatch):
    """It is made between the look at the rings and the moment at which the device gets no more kicks."""
    with drained() as device, ExitStack() as stack:
        lab = Lab(stack, device)
        lab.finish()
        set_kick = device.below.set_kick

        def guest_is_faster(index, eventfd):
            if eventfd is None:
                monkeypatch.undo()
                lab.disk.write(2)
                lab.queue.kick()
            set_kick(index, eventfd)

        monkeypatch.setattr(device.below, "set_kick", guest_is_faster)
        device.suspend()
        assert device.get_base(0) == SplitBase(lab.queue.avail_index)
        resume(device)
        lab.finish()


def test_a_queue_that_is_disabled_is_not_waited_for():
    with drained() as device, ExitStack() as stack:
        lab = Lab(stack, device)
        lab.finish()
        device.enable_queue(0, False)
        before = lab.queue.device_used_index
        lab.disk.write(1)
        device.suspend()
        assert device.get_base(0) == SplitBase(before)


def test_it_fails_with_what_is_below():
    with drained() as device, ExitStack() as stack:
        Lab(stack, device).finish()
        device.below.condemn("made up")
        with pytest.raises(DeviceFailed, match="made up"):
            device.check_health()
        assert device.state is RunState.FAILED
        device.reset()
        assert (device.state, device.below.state) == (RunState.RESET, RunState.RESET)


def test_it_is_moved_to_another(tmp_path):
    """Both have the same disk behind them."""
    (tmp_path / "disk").write_bytes(bytes(DISK_BYTES))
    with ExitStack() as stack:
        source, destination = (
            stack.enter_context(suspendable(Unsuspendable.blk_file(str(tmp_path / "disk"), timeout_s=5)))
            for _ in range(2)
        )
        lab = Lab(stack, source)
        destination.map([lab.memory.region])
        migrate(source, destination, limits())
        assert (source.state, destination.state) == (RunState.RESET, RunState.RUNNING)
        lab.finish()


def test_a_front_end_stops_and_starts_it():
    """By the positions that it asks for, as a VMM does when its guest is stopped."""
    with drained() as device, bridged(device) as front, ExitStack() as stack:
        lab = Lab(stack, front)
        lab.finish()
        for _ in range(3):
            front.suspend()
            assert front.get_base(0) == SplitBase(lab.queue.device_used_index)
            front.resume()
            lab.disk.write(3)
            lab.finish()


def test_it_is_not_served_without():
    with Unsuspendable.blk(DISK_BYTES) as disk, pytest.raises(MissingCapability, match="SUSPEND"):
        Server(disk, report=print)
