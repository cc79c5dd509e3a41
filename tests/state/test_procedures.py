"""Save, load and migrate between any two drivers, and what is left when any step of them fails."""

import os
import threading
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.deadline import Deadline
from vdpabridge.device import Capability, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import FeatureError, MissingCapability, StateError, VdpaBridgeError
from vdpabridge.memory import GuestMemory
from vdpabridge.state.channel import ChannelError, Limits
from vdpabridge.state.image import ImageError
from vdpabridge.state.procedures import ProcedureFailed, load, migrate, save, save_file, verify
from vdpabridge.state.snapshot import QueueEventfds, SnapshotError
from vdpabridge.virtqueue import SplitQueue
from vdpabridge.workload.block import BlockDriver, KnownDisk

from ..support.pair import bridged
from ..support.transitions import shared_file
from ..support.waiting import wait_until

VERSION_1 = 1 << 32
MEMORY_BYTES = 4 << 20
DISK_BYTES = 2 << 20
DRIVERS = ["sim", "vhost-user"]


def limits(**options):
    return Limits(Deadline(options.pop("timeout_s", 20)), **options)


@contextmanager
def made(driver, cls=Sim, size=DISK_BYTES, timeout_s=5):
    """(device, the simulated one at the end of it)."""
    with cls.blk(size, timeout_s=timeout_s) as sim:
        if driver == "sim":
            yield sim, sim
        else:
            with bridged(sim, timeout_s=timeout_s) as device:
                yield device, sim


class Lab:
    """A guest's memory and ring, and a disk that runs on it, with requests pending."""

    def __init__(self, stack, source):
        self.memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
        self.queue = stack.enter_context(SplitQueue(self.memory, 256))
        self.eventfds = {0: QueueEventfds(self.queue.kick_fd, self.queue.call_fd)}
        self.disk = KnownDisk(BlockDriver(self.memory, self.queue))
        source.map([self.memory.region])
        source.accept_features(VERSION_1)
        self.queue.attach(source, 0)
        source.start()
        for block in range(40):
            self.disk.write(block)
        self.disk.settle(self.disk.driver.drain())
        for block in range(40, 70):
            self.disk.write(block)

    def finish(self):
        """The pending requests are answered, and everything is as it ought to be."""
        self.disk.settle(self.disk.driver.drain())
        assert self.disk.verify() == 70


@contextmanager
def lab(driver, cls=Sim):
    with ExitStack() as stack:
        source, sim = stack.enter_context(made(driver, cls))
        yield source, sim, Lab(stack, source)


@pytest.mark.parametrize("to", DRIVERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_save_and_load(driver, to):
    with lab(driver) as (source, _, work), made(to) as (destination, _), shared_file(0) as file:
        report = save(source, file, limits(), go_on=False)
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
        assert [step.name for step in report.steps] == [
            "suspend",
            "capture",
            "device state",
            "check",
            "restore",
            "start",
            "reset the source",
        ]
        work.finish()


@pytest.mark.parametrize("driver", DRIVERS)
def test_save_twice_gives_equal_images_and_the_device_goes_on(driver):
    with lab(driver) as (source, _, work), shared_file(0) as first, shared_file(0) as second:
        source.suspend()
        for file in (first, second):
            save(source, file, limits())
        assert content(first) == content(second)
        source.resume()
        work.finish()


def test_save_load_save_gives_equal_images():
    with lab("sim") as (source, _, work), made("sim") as (destination, _), shared_file(0) as first:
        save(source, first, limits(), go_on=False)
        os.lseek(first, 0, os.SEEK_SET)
        destination.map([work.memory.region])
        load(destination, first, limits(), work.eventfds, start=False)
        with shared_file(0) as second:
            save(destination, second, limits())
            assert content(first) == content(second)


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
        save(source, writer, limits(), go_on=False)
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
    with lab("sim") as (source, _, work):
        reader, writer = os.pipe()
        with pytest.raises(ProcedureFailed, match="not done within"):
            save(source, writer, limits(timeout_s=0.2))
        os.close(writer)
        os.close(reader)
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
            for at in range(0, len(image), len(image) // 40):
                bent = bytearray(image)
                bent[at] ^= 4
                for wrong in (bytes(bent), image[:at]):
                    with opened(wrong) as file, pytest.raises(ImageError):
                        load(other, file, limits(), work.eventfds)
            assert (calls, other.state) == ([], RunState.RESET)


# --- an error at every step ---

HOOKS = (
    *("_accept_features", "_read_config", "_set_queue", "_set_base", "_get_base", "_bind_eventfd", "_enable_queue"),
    *("_start", "_resume", "_suspend", "_reset", "_set_state_fd", "_check_state"),
)


class Tripped(VdpaBridgeError):
    """What a test wanted to go wrong."""


def tripping():
    """A disk whose ``trip_at``-th call of a hook fails, once, before it does anything."""

    class Tripping(Sim):
        trip_at = None
        calls = 0

    def tripwire(name):
        def hook(self, *words, **options):
            Tripping.calls += 1
            if Tripping.calls == Tripping.trip_at:
                if name == "_set_state_fd":
                    os.close(words[2])
                raise Tripped(name)
            return getattr(super(Tripping, self), name)(*words, **options)

        return hook

    for name in HOOKS:
        setattr(Tripping, name, tripwire(name))
    return Tripping


def attempt(act, source_class, destination_class):
    """Run ``act`` on two disks; the one that runs now does the work to its end. Returns the error."""
    with lab("sim", source_class) as (source, _, work), made("sim", destination_class) as (destination, _):
        destination.map([work.memory.region])
        armed = [cls for cls in (source_class, destination_class) if hasattr(cls, "calls")]
        for cls in armed:
            cls.calls = 0
        error = act(source, destination, work)
        for cls in armed:
            cls.counted, cls.trip_at = cls.calls, None
        running = [device for device in (source, destination) if device.state is RunState.RUNNING]
        assert len(running) == 1, f"after {error}: {source}, {destination}"
        if isinstance(error, ProcedureFailed):
            assert error.running == running[0].name
        work.finish()
        return error


def migration(source, destination, _work):
    try:
        migrate(source, destination, limits())
    except (ProcedureFailed, Tripped) as error:
        assert source.state is RunState.RUNNING
        return error
    return None


def save_then_load(source, destination, work):
    """By an image: where the load fails, the source goes on."""
    with shared_file(0) as file:
        try:
            save(source, file, limits(), go_on=False)
            os.lseek(file, 0, os.SEEK_SET)
        except (ProcedureFailed, Tripped) as error:
            return error
        try:
            load(destination, file, limits(), work.eventfds)
        except (ProcedureFailed, Tripped):
            assert destination.state is RunState.RESET
            source.resume()
            return None
        return None


@pytest.mark.parametrize("act", [migration, save_then_load])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_an_error_at_every_step_leaves_one_that_runs(act, side):
    """Enumerated: every call of a driver's hook that the procedure makes fails once, in its own run."""
    cls = tripping()
    classes = (cls, Sim) if side == "source" else (Sim, cls)
    cls.trip_at = -1
    assert attempt(act, *classes) is None
    total = cls.counted
    assert total > 3
    failed = 0
    for number in range(1, total + 1):
        cls.trip_at = number
        failed += attempt(act, *classes) is not None
    # a source that cannot be reset at the end is no failure: the destination runs
    assert failed >= (total - 8 if act is migration else 0)


def test_a_large_state_takes_little_memory():
    """Through an image into a pipe and away: what is in memory does not grow with the state."""
    import resource

    with Sim.blk(256 << 20, timeout_s=60) as device:
        device.accept_features(VERSION_1)
        for at in range(0, 256 << 20, 1 << 20):
            os.pwrite(device.model._fd, os.urandom(1) * (1 << 20), at)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with open(os.devnull, "wb") as nowhere:
            report = save(device, nowhere.fileno(), limits(timeout_s=60))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert report.state_bytes > 256 << 20
        assert after - before < 64 << 10, "KiB"


def test_channel_error_is_one_line():
    assert str(ChannelError("transfer", why="too much")) == "transfer: too much"


# --- what must never be: two that run ---


class Stubborn(Sim):
    """A destination that fails to start, and then does not answer."""

    def _start(self):
        raise Tripped("start")

    def _reset(self):
        if getattr(self, "silent", True):
            raise Tripped("reset")
        super()._reset()


def test_a_destination_that_does_not_answer_keeps_the_source_stopped():
    """It may have started: nobody can know, and two that run would ruin the guest's memory."""
    with lab("sim") as (source, _, work), made("sim", Stubborn) as (destination, _):
        destination.map([work.memory.region])
        with pytest.raises(ProcedureFailed, match="not known: sim:blk does not answer") as caught:
            migrate(source, destination, limits())
        assert source.state is RunState.SUSPENDED
        assert caught.value.snapshot.queues[0].base.avail_index == work.queue.device_used_index
        assert [step.name for step in caught.value.report.steps][-1] == "undo: reset the destination"
        destination.silent = False
        destination.reset()
        source.resume()
        work.finish()


def test_a_suspend_that_ends_too_late_is_ended_before_the_device_goes_on():
    """The deadline passes while requests are in flight; the back-end stops its ring all the same, later."""
    with lab("vhost-user") as (source, sim, work), shared_file(0) as file:
        sim.faults.latency_s = 0.5
        work.queue.kick()
        wait_until(lambda: sim._engine.workers[0].ring.taken)
        with pytest.raises(ProcedureFailed) as caught:
            save(source, file, limits(timeout_s=0.2))
        sim.faults.latency_s = 0
        assert caught.value.running == source.name
        assert "undo: end the suspend" in [step.name for step in caught.value.report.steps]
        work.finish()


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
    def fail(*_words):
        raise OSError(5, "Input/output error")

    with lab("sim") as (source, _, work):
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(ProcedureFailed, match="Input/output error"):
            save_file(source, str(tmp_path / "image"), limits(), go_on=False)
        assert source.state is RunState.RUNNING
        assert list(tmp_path.iterdir()) == []
        work.finish()


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "x"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with lab("sim") as (source, _, work):
        with pytest.raises(ProcedureFailed, match="what is there is no file"):
            save_file(source, str(path), limits())
        work.finish()


def test_a_smaller_disk_is_another_disk():
    class NoState(Sim):
        capabilities = frozenset(Capability) - {Capability.DEVICE_STATE}

    with lab("sim", NoState) as (source, _, work), made("sim", NoState, size=4096) as (destination, _):
        with pytest.raises(SnapshotError, match="differs from byte 0 on"):
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
    from vdpabridge.state import carry

    monkeypatch.setattr(carry, "_SPOOL_BYTES", 4096)
    with lab("sim") as (source, _, work):
        image = image_of(source)
        with made("sim") as (destination, _), opened(image) as file:
            destination.map([work.memory.region])
            assert load(destination, file, limits(), {}, start=False).state_bytes > 4096
        monkeypatch.setenv("TMPDIR", "/nowhere")
        monkeypatch.setattr(carry.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(28, "full")))
        with made("sim") as (destination, _), opened(image) as file:
            with pytest.raises(VdpaBridgeError, match="No space left"):
                load(destination, file, limits(), {})
            assert destination.state is RunState.RESET
        work.finish()


class LateFailure(Sim):
    """It starts, does some work, and then says that it could not start."""

    def _start(self):
        super()._start()
        wait_until(lambda: self._engine._answered > 3)
        self._stop_workers(list(self._engine.workers), drain=True)
        self._engine.stop()
        raise Tripped("start")


def test_work_that_a_failed_destination_has_done_is_not_done_again():
    with lab("sim") as (source, _, work), made("sim", LateFailure) as (destination, _):
        destination.map([work.memory.region])
        with pytest.raises(ProcedureFailed, match="had begun to work") as caught:
            migrate(source, destination, limits())
        assert caught.value.running.startswith("nothing")
        assert (source.state, destination.state) == (RunState.SUSPENDED, RunState.RESET)
        assert work.queue.device_used_index > caught.value.snapshot.queues[0].base.avail_index


# --- the same errors, after they took effect, and through a socket ---


def tripping_late():
    """A disk whose ``trip_at``-th call of a hook is done, and then fails."""
    cls = tripping()
    early = {name: getattr(cls, name) for name in HOOKS}

    def late(name):
        def hook(self, *words, **options):
            cls.calls += 1
            result = getattr(super(cls, self), name)(*words, **options)
            if cls.calls == cls.trip_at and name != "_start":
                raise Tripped(name)
            return result

        return hook

    for name in early:
        setattr(cls, name, late(name))
    return cls


@pytest.mark.parametrize("act", [migration, save_then_load])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_an_error_after_every_step_leaves_one_that_runs(act, side):
    """As a reply that is lost: the device did what it was told, and whoever told it hears of a failure."""
    cls = tripping_late()
    classes = (cls, Sim) if side == "source" else (Sim, cls)
    cls.trip_at = -1
    assert attempt(act, *classes) is None
    for number in range(1, cls.counted + 1):
        cls.trip_at = number
        attempt(act, *classes)
