"""What is asked before anything is touched: is all memory there, and would state be lost that nobody accepted to lose."""

import dataclasses
import os
import signal

import pytest

from vdpabridge.abi.virtio import VIRTIO_F_VERSION_1, VIRTIO_ID_NET
from vdpabridge.device import Capability, DirtyLog, Identity, MemoryRegion, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.sim.fs import FsModel
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import MissingCapability, StateError, VdpaBridgeError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.image.fit import check_fits, facts_of
from vdpabridge.state.losses import Loss, StateWouldBeLost
from vdpabridge.state.procedures import load, migrate, save
from vdpabridge.state.replay import replay, resume
from vdpabridge.state.snapshot import SnapshotError, capture

from ...support.disk_lab import lab, limits, made
from ...support.fake_kernel import FakeKernel, Parent
from ...support.mount import Mount
from ...support.transitions import eventfd, shared_file

EVERYTHING = frozenset(Capability)
CTRL_VQ = 1 << 17


class WithoutState(Sim):
    capabilities = EVERYTHING - {Capability.DEVICE_STATE}


class WithoutResume(Sim):
    capabilities = EVERYTHING - {Capability.DEVICE_STATE, Capability.RESUME}


class Net(WithoutState):
    """As far as anybody asks, a network device whose guest uses its control queue."""

    @property
    def identity(self):
        mine = super().identity
        return Identity(VIRTIO_ID_NET, mine.queue_count, mine.queue_size_max, 0)

    @property
    def offered_features(self):
        return super().offered_features | CTRL_VQ


class NetWithoutResume(Net):
    capabilities = Net.capabilities - {Capability.RESUME}


def parts(memory, *spans):
    return [MemoryRegion(memory.guest_address + at, size, memory.fileno(), at) for at, size in spans]


# --- memory ---


@pytest.mark.parametrize("cls", [Sim, WithoutState])
@pytest.mark.parametrize(
    ("spans", "gap"),
    [
        ((), "queue 0 has 4096 bytes at 0x10000000"),
        (((0, 2 << 20),), "the guest has 2097152 bytes at 0x10200000"),
        (((0, 1 << 20), (2 << 20, 2 << 20)), "the guest has 3145728 bytes at 0x10100000"),
        (((4096, (4 << 20) - 4096),), "queue 0 has 4096 bytes at 0x10000000"),
    ],
)
def test_memory_that_the_guest_has_and_the_destination_lacks(cls, spans, gap):
    """Seen before the source is even asked to stop."""
    with lab("sim", cls) as (source, _, work), made("sim", cls) as (destination, _):
        if spans:
            destination.map(parts(work.memory, *spans))
        with pytest.raises(SnapshotError, match=gap):
            migrate(source, destination, limits())
        assert (source.state, destination.state) == (RunState.RUNNING, RunState.RESET)
        work.finish()


def test_memory_in_other_pieces_is_the_same_memory():
    with lab("sim", Sim) as (source, _, work), made("sim", Sim) as (destination, _):
        destination.map(parts(work.memory, (1 << 20, 3 << 20), (0, 1 << 20)))
        migrate(source, destination, limits())
        work.finish()


def test_an_image_needs_its_rings_mapped():
    with lab("sim") as (source, _, work), made("sim") as (destination, _), shared_file(0) as file:
        save(source, file, limits(), stay_suspended=True)
        os.lseek(file, 0, os.SEEK_SET)
        with pytest.raises(SnapshotError, match="queue 0 has 4096 bytes at 0x10000000, which is not mapped"):
            load(destination, file, limits(), work.eventfds)
        assert destination.state is RunState.RESET


# --- losses ---


def test_a_file_server_without_state_cannot_be_moved(request):
    """Its files would be open in nobody."""
    del request
    from contextlib import ExitStack

    with ExitStack() as stack, WithoutState.fs(timeout_s=5) as source, Sim.fs(timeout_s=5) as destination:
        mount = Mount(stack, source)
        destination.map([mount.memory.region])
        with pytest.raises(StateWouldBeLost, match="the device's own state would be lost") as caught:
            migrate(source, destination, limits())
        assert caught.value.losses == {Loss.DEVICE_STATE}
        assert source.state is RunState.RUNNING
        assert mount.read()
        with shared_file(0) as file, pytest.raises(StateWouldBeLost):
            save(source, file, limits())


def test_state_that_is_missing_is_not_loaded_as_none():
    with lab("sim", WithoutState) as (source, _, work), made("sim") as (destination, _), shared_file(0) as file:
        work.disk.settle(work.disk.driver.drain())
        save(source, file, limits(), stay_suspended=True)
        os.lseek(file, 0, os.SEEK_SET)
        destination.map([work.memory.region])
        with pytest.raises(StateWouldBeLost, match="device-state"):
            load(destination, file, limits(), work.eventfds)
        assert destination.state is RunState.RESET
        os.lseek(file, 0, os.SEEK_SET)
        load(destination, file, limits(), work.eventfds, accept={Loss.DEVICE_STATE})
        assert destination.state is RunState.RUNNING


@pytest.mark.parametrize("act", ["save", "migrate"])
def test_what_a_guest_set_by_a_control_queue(act):
    with Net.blk(1 << 20, timeout_s=5) as source, Net.blk(1 << 20, timeout_s=5) as destination:
        source.accept_features(1 << VIRTIO_F_VERSION_1 | CTRL_VQ)
        source.start()

        def attempt(**options):
            if act == "migrate":
                migrate(source, destination, limits(), **options)
                return
            with shared_file(0) as file:
                save(source, file, limits(), **options)

        with pytest.raises(StateWouldBeLost, match="MAC filters, queue pairs, VLANs, offloads") as caught:
            attempt()
        assert (source.state, caught.value.losses) == (RunState.RUNNING, {Loss.CONTROL_QUEUE})
        attempt(accept={Loss.CONTROL_QUEUE})


def test_a_replay_would_lose_what_a_control_queue_set():
    with NetWithoutResume.blk(1 << 20, timeout_s=5) as device:
        device.accept_features(1 << VIRTIO_F_VERSION_1 | CTRL_VQ)
        device.start()
        device.suspend()
        with pytest.raises(StateWouldBeLost):
            resume(device)
        assert device.state is RunState.SUSPENDED
        resume(device, accept={Loss.CONTROL_QUEUE})
        assert device.state is RunState.RUNNING


def test_a_replay_keeps_the_devices_own_state():
    with Sim(FsModel(), "sim:fs", timeout_s=5) as device:
        device.accept_features(1 << VIRTIO_F_VERSION_1)
        device.start()
        device.suspend()
        device.model.session.next_handle = 77
        replay(device)
        assert (device.state, device.model.session.next_handle) == (RunState.RUNNING, 77)


def test_a_replay_of_a_device_that_does_not_give_its_state_does_nothing():
    class Silent(Sim):
        def _set_state_fd(self, direction, phase, fd):
            os.close(fd)
            raise VdpaBridgeError("transfer device state", device=self.name, why="a test refused it")

    with Silent(FsModel(), "sim:fs", timeout_s=5) as device:
        device.accept_features(1 << VIRTIO_F_VERSION_1)
        device.start()
        device.suspend()
        with pytest.raises(VdpaBridgeError, match="a test refused it"):
            replay(device)
        assert (device.state, device.accepted_features) == (RunState.SUSPENDED, 1 << VIRTIO_F_VERSION_1)


# --- states ---


def test_only_a_suspended_device_resumes():
    """One that was never started is not started by the way."""
    with WithoutResume.blk(1 << 20, timeout_s=5) as device:
        device.accept_features(1 << VIRTIO_F_VERSION_1)
        with pytest.raises(StateError, match="only while it is suspended"):
            resume(device)
        assert device.state is RunState.CONFIGURED


def test_requests_that_were_left_in_flight_are_not_left_behind():
    with lab("sim") as (source, _, work), made("sim") as (destination, _), shared_file(0) as file:
        work.disk.settle(work.disk.driver.drain())
        source.suspend()
        region = source.get_inflight(2, 256)
        source.set_inflight(region)
        os.close(region.fd)
        source.resume()
        source.suspend(drain=False)
        destination.map([work.memory.region])
        for act in (lambda: migrate(source, destination, limits()), lambda: save(source, file, limits())):
            with pytest.raises(VdpaBridgeError, match="requests in flight, which would never be answered"):
                act()
        source.resume()
        migrate(source, destination, limits())
        work.finish()


def test_a_stopped_device_that_could_not_go_on_with_its_state():
    class Stateful(Sim):
        capabilities = EVERYTHING - {Capability.RESUME}

    with lab("sim", Stateful) as (source, _, _work), shared_file(0) as file:
        source.suspend()
        with pytest.raises(MissingCapability, match="RESUME"):
            save(source, file, limits())


# --- what an image cannot say, and what does not fit ---


def test_a_queue_in_another_address_space_cannot_be_saved():
    """An image cannot record it: it would be restored into space 0."""
    parent = Parent(device_id=1, queues=3, address_spaces=2, groups=((0, 0), (0, 0), (1, 1)))
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 64) as queue,
        shared_file(0) as file,
        VhostVdpa.open("/dev/vhost-vdpa-0", system=FakeKernel(parent)) as device,
    ):
        device.accept_features(1 << 32)
        queue.attach(device, 2, address_space=1)
        with pytest.raises(VdpaBridgeError, match="queue 2 is in address space 1, which an image cannot record"):
            save(device, file, limits())


@pytest.mark.parametrize("size", [0, 8, 61])
def test_a_configuration_space_of_another_size(size):
    with made("sim") as (device, _), lab("sim") as (source, _, work):
        source.suspend()
        facts = facts_of(source, capture(source))
        snapshot = dataclasses.replace(facts.snapshot, config=facts.snapshot.config.ljust(size, b"\0")[:size])
        with pytest.raises(SnapshotError, match=f"its configuration space has {size} bytes, and the device's 96"):
            check_fits(dataclasses.replace(facts, snapshot=snapshot), device)
        source.resume()
        work.finish()


# --- reset and replay ---


def test_a_replay_keeps_the_eventfd_for_configuration_changes():
    with lab("sim", WithoutResume) as (device, _, work), eventfd() as changed:
        device.set_config_call(changed)
        device.suspend()
        resume(device)
        assert device.config_call is not None
        device.write_config(32, b"\0")
        assert os.eventfd_read(changed) == 1
        work.finish()


def test_a_replay_keeps_the_dirty_log_and_the_in_flight_region():
    log_bytes = 1 << 14
    with lab("sim", WithoutResume) as (device, _, work), shared_file(log_bytes) as log:
        device.suspend()
        region = device.get_inflight(1, 256)
        device.set_inflight(region)
        os.close(region.fd)
        device.set_dirty_log(DirtyLog(log, log_bytes))
        resume(device)
        assert (device.dirty_log.size_bytes, device.inflight.queue_count) == (log_bytes, 1)
        work.finish()
        assert device._engine.workers[0].ring.tracked
        assert any(os.pread(log, log_bytes, 0))


def test_a_replay_is_not_cut_in_two_by_a_signal():
    class Alarming(WithoutResume):
        def _reset(self):
            super()._reset()
            if self.state is RunState.SUSPENDED:
                signal.raise_signal(signal.SIGINT)

    with lab("sim", Alarming) as (device, _, work):
        device.suspend()
        with pytest.raises(KeyboardInterrupt):
            resume(device)
        assert device.state is RunState.RUNNING
        work.finish()
