"""Save, load and migrate between any two drivers."""

import os
import socket
import struct
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from vdpabridge.abi.virtio_blk import VIRTIO_BLK_CONFIG, VIRTIO_BLK_F_CONFIG_WCE
from vdpabridge.device import Capability, QueueSetup, RunState, SplitBase
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import FeatureError, MissingCapability, StateError, VdpaBridgeError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.state.image.reader import ImageError
from vdpabridge.state.procedures import ProcedureFailed, load, migrate, save, save_file, verify
from vdpabridge.state.snapshot import SnapshotError
from vdpabridge.state.transfer.channel import ChannelError

from ...support.disk_lab import DISK_BYTES, VERSION_1, lab, limits, made
from ...support.mount import Mount
from ...support.pair import bridged
from ...support.transitions import shared_file

DRIVERS = ["sim", "vhost-user"]


@pytest.mark.parametrize("to", DRIVERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_save_and_load(driver, to):
    with lab(driver) as (source, _, work), made(to) as (destination, _), shared_file(0) as file:
        report = save(source, file, limits(), stay_suspended=True)
        assert source.state is RunState.SUSPENDED
        assert report.state_bytes > 40 * 4096
        os.lseek(file, 0, os.SEEK_SET)
        destination.map([work.memory.region])
        loaded = load(destination, file, limits(), work.eventfds)
        assert loaded.digest == report.digest
        assert loaded.state_bytes == report.state_bytes
        work.finish()


@pytest.mark.parametrize("to", DRIVERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_migrate(driver, to):
    with lab(driver) as (source, _, work), made(to) as (destination, _):
        destination.map([work.memory.region])
        report = migrate(source, destination, limits())
        assert (source.state, destination.state) == (RunState.RESET, RunState.RUNNING)
        if driver == "vhost-user":
            assert report.steps.pop(0).name == "queue 0", "which is stopped by itself, within the suspend"
        assert report.copied_by == "splice"
        assert [step.name for step in report.steps] == [
            "suspend",
            "capture",
            "device state",
            "check",
            "prepare",
            "place",
            "start",
            "reset the source",
        ]
        work.finish()


@contextmanager
def file_server(driver):
    with Sim.fs(timeout_s=5) as sim:
        if driver == "sim":
            yield sim
        else:
            with bridged(sim) as device:
                yield device


@pytest.mark.parametrize("by", ["migration", "image"])
@pytest.mark.parametrize("to", DRIVERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_an_open_file_goes_along(driver, to, by):
    with file_server(driver) as source, file_server(to) as destination, ExitStack() as stack, shared_file(0) as file:
        mount = Mount(stack, source)
        destination.map([mount.memory.region])
        if by == "migration":
            migrate(source, destination, limits())
        else:
            save(source, file, limits(), stay_suspended=True)
            os.lseek(file, 0, os.SEEK_SET)
            load(destination, file, limits(), mount.eventfds)
        assert mount.read() == b"These"


@pytest.mark.parametrize("driver", DRIVERS)
def test_save_twice_gives_equal_images_and_the_device_goes_on(driver):
    with lab(driver) as (source, _, work), shared_file(0) as first, shared_file(0) as second:
        source.suspend()
        for file in (first, second):
            save(source, file, limits())
        assert content(first) == content(second)
        source.resume()
        work.finish()


QUEUES = st.lists(st.tuples(st.integers(1, 10).map(lambda bits: 1 << bits), st.integers(0, 0xFFFF)), max_size=2)
BLOCKS = st.dictionaries(st.integers(0, DISK_BYTES // 512 - 1), st.binary(min_size=1, max_size=512), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, (1 << 64) - 1), QUEUES, BLOCKS, st.integers(0, 1), st.booleans())
def test_save_load_save_gives_equal_images(features, queues, blocks, writeback, started):
    """Of any disk: what it accepted, where its queues stand, what is on it, what its guest has set."""
    with (
        GuestMemory(1 << 20) as memory,
        Sim.blk(DISK_BYTES, timeout_s=5) as source,
        Sim.blk(DISK_BYTES, timeout_s=5) as destination,
        shared_file(0) as first,
        shared_file(0) as second,
    ):
        for sector, data in blocks.items():
            os.pwrite(source.model._fd, data, sector * 512)
        for device in (source, destination):
            device.map([memory.region])
        source.accept_features(VERSION_1 | features & source.offered_features)
        source.write_config(VIRTIO_BLK_CONFIG.offsets["wce"], bytes([writeback]))
        for index, (size, position) in enumerate(queues):
            desc, avail, used = (memory.allocate(16 * size) for _ in range(3))
            # nothing is pending: the guest has made as much available as was taken
            memory.slice(avail, 4)[:] = struct.pack("<HH", 0, position)
            source.set_queue(index, QueueSetup(size, desc, avail, used))
            source.set_base(index, SplitBase(position))
            source.enable_queue(index, bool(position & 1))
        if started:
            source.start()
        report = save(source, first, limits())
        os.lseek(first, 0, os.SEEK_SET)
        assert load(destination, first, limits(), {}).digest == report.digest
        assert destination.state is (RunState.RUNNING if started else RunState.CONFIGURED)
        save(destination, second, limits())
        assert content(first) == content(second)


def test_a_source_that_was_never_started_leaves_a_destination_that_is_not_either():
    with Sim.blk(DISK_BYTES, timeout_s=5) as source, Sim.blk(DISK_BYTES, timeout_s=5) as destination:
        source.accept_features(VERSION_1)
        assert "start" not in [step.name for step in migrate(source, destination, limits()).steps]
        assert (source.state, destination.state) == (RunState.RESET, RunState.CONFIGURED)


class WithoutState(Sim):
    """As a vDPA disk is: what the guest has set is all in its configuration space."""

    capabilities = frozenset(Capability) - {Capability.DEVICE_STATE}


class Blind(WithoutState):
    """As a back-end without CONFIG: its guest writes what we do not see."""

    @property
    def identity(self):
        return replace(super().identity, config_size_bytes=0)


def test_what_cannot_be_seen_is_not_set_again():
    with Blind.blk(DISK_BYTES, timeout_s=5) as source, Blind.blk(DISK_BYTES, timeout_s=5) as destination:
        source.accept_features(VERSION_1 | 1 << VIRTIO_BLK_F_CONFIG_WCE)
        source.start()
        migrate(source, destination, limits())
        assert destination.state is RunState.RUNNING


class ReadOnly(WithoutState):
    capabilities = WithoutState.capabilities - {Capability.CONFIG_WRITE}


class Deaf(WithoutState):
    """It ignores what is written, as devices do."""

    def _write_config(self, offset, data):
        return


def writes_through(device):
    return device.read_config(VIRTIO_BLK_CONFIG.offsets["wce"], 1) == b"\0"


def test_what_the_guest_has_set_is_set_again():
    """A guest that was told that its writes are on the disk relies on it."""
    wce = 1 << VIRTIO_BLK_F_CONFIG_WCE
    with WithoutState.blk(DISK_BYTES, timeout_s=5) as source:
        source.accept_features(VERSION_1 | wce)
        source.write_config(VIRTIO_BLK_CONFIG.offsets["wce"], b"\0")
        with Deaf.blk(DISK_BYTES) as other, pytest.raises(ProcedureFailed, match="does not take 00 at 32"):
            migrate(source, other, limits())
        with ReadOnly.blk(DISK_BYTES) as other, pytest.raises(SnapshotError, match="cannot be written"):
            migrate(source, other, limits())
        with WithoutState.blk(DISK_BYTES) as other:
            assert not writes_through(other)
            migrate(source, other, limits())
            assert writes_through(other)


def content(file):
    return os.pread(file, os.fstat(file).st_size, 0)


def test_a_running_device_goes_on_after_a_save():
    with lab("sim") as (source, _, work), shared_file(0) as file:
        save(source, file, limits())
        assert source.state is RunState.RUNNING
        work.finish()


def test_through_a_pipe():
    with lab("sim") as (source, _, work), made("sim") as (destination, _):
        reader, writer = os.pipe()
        destination.map([work.memory.region])
        errors = []

        def receive():
            try:
                load(destination, reader, limits(), work.eventfds)
            except VdpaBridgeError as error:
                errors.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        save(source, writer, limits(), stay_suspended=True)
        os.close(writer)
        thread.join()
        os.close(reader)
        assert errors == []
        work.finish()


def test_to_a_file(tmp_path):
    with lab("sim") as (source, _, work):
        path = tmp_path / "image"
        path.write_bytes(b"what was there")
        save_file(source, str(path), limits())
        with path.open("rb") as file:
            facts = verify(file.fileno(), limits())
        assert facts.snapshot.device_id == 2
        assert sorted(tmp_path.iterdir()) == [path]
        work.finish()


def test_a_file_that_cannot_be_finished_is_as_it_was(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"what was there")
    with lab("sim") as (source, sim, work):
        sim.faults.fail_check = True
        with pytest.raises(ProcedureFailed, match="running now: sim:blk"):
            save_file(source, str(path), limits())
        assert path.read_bytes() == b"what was there"
        assert sorted(tmp_path.iterdir()) == [path]
        work.finish()


def test_a_sink_that_is_full():
    with lab("sim") as (source, _, work), open("/dev/full", "wb") as full:
        with pytest.raises(ProcedureFailed, match="No space left"):
            save(source, full.fileno(), limits())
        assert source.state is RunState.RUNNING
        work.finish()


def test_a_reader_that_leaves():
    with lab("sim") as (source, _, work):
        reader, writer = os.pipe()
        os.close(reader)
        with pytest.raises(ProcedureFailed, match="Broken pipe"):
            save(source, writer, limits())
        os.close(writer)
        work.finish()


def test_a_reader_that_stalls_is_a_deadline():
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with ours, theirs, lab("sim") as (source, _, work):
        with pytest.raises(ProcedureFailed, match="not done within"):
            save(source, ours.fileno(), limits(timeout_s=0.2))
        work.finish()


def test_more_state_than_is_allowed():
    with lab("sim") as (source, _, work), shared_file(0) as file:
        with pytest.raises(ProcedureFailed, match="more than 5000 bytes"):
            save(source, file, limits(size_bytes=5000))
        work.finish()


def test_somebody_cancels():
    event = os.eventfd(1)
    with lab("sim") as (source, _, work), shared_file(0) as file:
        with pytest.raises(ProcedureFailed, match="cancelled"):
            save(source, file, limits(cancel_fd=event))
        work.finish()
    os.close(event)


def test_progress():
    seen = []
    with lab("sim") as (source, _, _), shared_file(0) as file:
        report = save(source, file, limits(progress=seen.append))
        assert seen == sorted(seen)
        assert seen[-1] == report.state_bytes


# --- what does not fit ---


def image_of(source):
    with shared_file(0) as file:
        save(source, file, limits())
        return content(file)


@contextmanager
def opened(image):
    with shared_file(0) as file:
        os.write(file, image)
        os.lseek(file, 0, os.SEEK_SET)
        yield file


class NoState(Sim):
    capabilities = frozenset(Capability) - {Capability.DEVICE_STATE}


class NoSuspend(Sim):
    capabilities = frozenset(Capability) - {Capability.SUSPEND}


class OneFeature(Sim):
    offered_features = 1 << 33


def test_devices_that_do_not_fit_are_not_touched():
    with lab("sim") as (source, _, _):
        image = image_of(source)
        others = [
            (Sim.fs(), SnapshotError, "device id"),
            (OneFeature.blk(DISK_BYTES), FeatureError, "0x100000000"),
            (NoState.blk(DISK_BYTES), MissingCapability, "DEVICE_STATE"),
        ]
        for other, error, why in others:
            with other, opened(image) as file:
                with pytest.raises(error, match=why):
                    load(other, file, limits(), {})
                assert other.state is RunState.RESET
                os.lseek(file, 0, os.SEEK_SET)
                with pytest.raises(error, match=why):
                    verify(file, limits(), other)
                with pytest.raises(error, match=why):
                    migrate(source, other, limits())
                assert source.state is RunState.RUNNING


def test_a_device_in_no_state_to_be_saved():
    refused = pytest.raises(StateError, match="not while the device is reset")
    with Sim.blk(DISK_BYTES) as device, shared_file(0) as file, refused:
        save(device, file, limits())
    with lab("sim", NoSuspend) as (device, _, work), shared_file(0) as file:
        with pytest.raises(MissingCapability, match="SUSPEND"):
            save(device, file, limits())
        work.finish()


def test_a_damaged_image_shows_the_device_nothing():
    with lab("sim") as (source, _, work):
        image = image_of(source)
        calls = []

        class Watched(Sim):
            def _set_state_fd(self, direction, phase, fd):
                calls.append(direction)
                return super()._set_state_fd(direction, phase, fd)

        with Watched.blk(DISK_BYTES, timeout_s=5) as other:
            other.map([work.memory.region])
            for at in range(0, len(image), len(image) // 40):
                bent = bytearray(image)
                bent[at] ^= 4
                for wrong in (bytes(bent), image[:at]):
                    with opened(wrong) as file, pytest.raises(ImageError):
                        load(other, file, limits(), work.eventfds)
            assert (calls, other.state) == ([], RunState.RESET)


def test_channel_error_is_one_line():
    assert str(ChannelError("transfer", why="too much")) == "transfer: too much"


class Interrupted(Sim):
    """Somebody presses Ctrl-C in the middle."""

    interrupted = False

    def _check_state(self):
        if not Interrupted.interrupted:
            Interrupted.interrupted = True
            raise KeyboardInterrupt
        super()._check_state()


def test_an_interruption_goes_through_and_leaves_the_source_running():
    with lab("sim", Interrupted) as (source, _, work), shared_file(0) as file:
        with pytest.raises(KeyboardInterrupt):
            save(source, file, limits())
        assert source.state is RunState.RUNNING
        work.finish()


def test_a_file_that_cannot_be_put_in_place_leaves_the_source_running(tmp_path, monkeypatch):
    def fail(*_words, **_options):
        raise OSError(5, "Input/output error")

    with lab("sim") as (source, _, work):
        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(ProcedureFailed, match="Input/output error"):
            save_file(source, str(tmp_path / "image"), limits(), stay_suspended=True)
        assert source.state is RunState.RUNNING
        assert list(tmp_path.iterdir()) == []
        work.finish()


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "x"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with lab("sim") as (source, _, work):
        with pytest.raises(ProcedureFailed, match="it is not a file"):
            save_file(source, str(path), limits())
        work.finish()


def test_a_smaller_disk_is_another_disk():
    class NoState(Sim):
        capabilities = frozenset(Capability) - {Capability.DEVICE_STATE}

    with lab("sim", NoState) as (source, _, work), made("sim", NoState, size=4096) as (destination, _):
        with pytest.raises(
            SnapshotError, match="differs in capacity: 0010000000000000 was saved, and here is 0800000000000000"
        ):
            migrate(source, destination, limits())
        work.finish()


def test_a_device_that_would_lose_its_state_by_going_on_is_not_stopped():
    class NoResume(Sim):
        capabilities = frozenset(Capability) - {Capability.RESUME}

    with lab("sim", NoResume) as (source, _, work), shared_file(0) as file:
        with pytest.raises(MissingCapability, match="RESUME"):
            save(source, file, limits())
        assert source.state is RunState.RUNNING
        work.finish()


def test_configuration_changes_are_announced_by_the_destination():
    with lab("sim") as (source, _, work), made("sim") as (destination, _):
        destination.map([work.memory.region])
        changed = os.eventfd(0, os.EFD_NONBLOCK)
        source.set_config_call(changed)
        migrate(source, destination, limits())
        destination.write_config(32, b"\0")
        assert os.eventfd_read(changed) == 1
        os.close(changed)
        work.finish()


def test_a_spool_that_fails_is_closed_once(monkeypatch):
    """State too large for memory goes to disk, which may be full."""
    from vdpabridge.state.transfer import carry

    monkeypatch.setattr(carry, "_SPOOL_BYTES", 4096)
    with lab("sim") as (source, _, work):
        image = image_of(source)
        with made("sim") as (destination, _), opened(image) as file:
            destination.map([work.memory.region])
            assert load(destination, file, limits(), {}, start=False).state_bytes > 4096
        monkeypatch.setenv("TMPDIR", "/nowhere")
        monkeypatch.setattr(carry.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(28, "full")))
        with made("sim") as (destination, _), opened(image) as file:
            destination.map([work.memory.region])
            with pytest.raises(VdpaBridgeError, match="No space left"):
                load(destination, file, limits(), {})
            assert destination.state is RunState.RESET
        work.finish()
