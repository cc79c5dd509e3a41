"""What is left when any step of save, load or migrate fails: one device that runs, and the report says which.

The same with processes that are killed or stopped is in `test_processes`.
"""

import itertools
import os
import resource
import signal
import time
from contextlib import contextmanager

import pytest

from vdpabridge.device import Capability, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import DeadlineExceeded, VdpaBridgeError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.state.procedures import Advice, ProcedureFailed, load, migrate, save, save_file, transaction
from vdpabridge.state.procedures.witness import Witness
from vdpabridge.state.replay import ReplayFailed, resume
from vdpabridge.state.snapshot import DeviceSnapshot
from vdpabridge.state.transfer import channel

from ...support.disk_lab import lab, limits, made
from ...support.transitions import shared_file
from ...support.waiting import wait_until

# --- an error at every step ---

HOOKS = (
    *("_accept_features", "_read_config", "_set_queue", "_set_base", "_get_base", "_bind_eventfd", "_enable_queue"),
    *("_start", "_resume", "_suspend", "_reset", "_set_state_fd", "_check_state"),
)


class Tripped(VdpaBridgeError):
    """What a test wanted to go wrong."""


class WithoutState(Sim):
    """As a vDPA disk is; the destination is set up while this one is at work."""

    capabilities = frozenset(Capability) - {Capability.DEVICE_STATE}


def tripping(base=Sim):
    """A disk whose ``trip_at``-th call of a hook fails, once, before it does anything."""

    class Tripping(base):
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
        if Capability.DEVICE_STATE not in source.capabilities:
            # one disk behind both
            os.dup2(source.model._fd, destination.model._fd, inheritable=False)
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
            save(source, file, limits(), stay_suspended=True)
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


BASES = [Sim, WithoutState]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("act", [migration, save_then_load])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_an_error_at_every_step_leaves_one_that_runs(act, side, base):
    """Enumerated: every call of a driver's hook that the procedure makes fails once, in its own run."""
    cls = tripping(base)
    classes = (cls, base) if side == "source" else (base, cls)
    cls.trip_at = -1
    assert attempt(act, *classes) is None
    total = cls.counted
    assert total >= 3
    failed = 0
    for number in range(1, total + 1):
        cls.trip_at = number
        failed += attempt(act, *classes) is not None
    # a source that cannot be reset at the end is no failure: the destination runs
    assert failed >= (total - 8 if act is migration else 0)


# --- what must never be: two that run ---


class Slow(WithoutState):
    """It is set up when no time is left."""

    def _set_queue(self, *words):
        super()._set_queue(*words)
        time.sleep(0.2)


class Watched(WithoutState):
    asked = ()

    def _suspend(self, **options):
        self.asked = (*self.asked, "suspend")
        super()._suspend(**options)


def test_a_destination_that_takes_too_long_to_be_set_up_leaves_the_source_alone():
    """It is not even suspended."""
    with lab("sim", Watched) as (source, _, work), made("sim", Slow) as (destination, _):
        destination.map([work.memory.region])
        with pytest.raises(ProcedureFailed, match="no time is left") as caught:
            migrate(source, destination, limits(timeout_s=0.1))
        assert (caught.value.running, source.state, source.asked) == (source.name, RunState.RUNNING, ())
        work.finish()


class SlowAtTheEnd(WithoutState):
    """Its last queue is put in place when no time is left."""

    def _enable_queue(self, *words):
        super()._enable_queue(*words)
        if self.state is RunState.CONFIGURED:
            time.sleep(0.5)


def test_a_destination_that_there_is_no_time_to_start_has_not_started():
    with lab("sim", Watched) as (source, _, work), made("sim", SlowAtTheEnd) as (destination, _):
        destination.map([work.memory.region])
        with pytest.raises(ProcedureFailed, match="no time is left") as caught:
            migrate(source, destination, limits(timeout_s=0.4))
        assert (caught.value.running, destination.state) == (source.name, RunState.RESET)
        work.finish()


class Stubborn(Sim):
    """A destination that fails to start, and then cannot be reset."""

    resets = 0

    def _start(self):
        raise Tripped("start")

    def _reset(self):
        self.resets += 1
        if self.resets == 1:
            raise Tripped("reset")
        super()._reset()


class Lingering(Stubborn):
    """One of which it is not certain that it has ended."""

    def _give_up(self):
        super()._give_up()
        return False


def test_a_destination_that_cannot_be_reset_is_let_go_of():
    with lab("sim") as (source, _, work), made("sim", Stubborn) as (destination, _):
        destination.map([work.memory.region])
        with pytest.raises(ProcedureFailed, match="running now: sim:blk") as caught:
            migrate(source, destination, limits())
        assert [step.name for step in caught.value.report.steps][-4:] == [
            "undo: reset the destination",
            "undo: give the destination up",
            "undo: abandon the transfer",
            "undo: resume",
        ]
        assert "closed" in repr(destination)
        work.finish()


def test_a_destination_that_does_not_answer_keeps_the_source_stopped():
    """It may have started: nobody can know, and two that run would ruin the guest's memory."""
    with lab("sim") as (source, _, work), made("sim", Lingering) as (destination, _):
        destination.map([work.memory.region])
        with pytest.raises(ProcedureFailed, match="not known: sim:blk does not answer") as caught:
            migrate(source, destination, limits())
        assert source.state is RunState.SUSPENDED
        assert caught.value.snapshot.queues[0].base.avail_index == work.queue.device_used_index
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
        with pytest.raises(ProcedureFailed, match="begun to work") as caught:
            migrate(source, destination, limits())
        assert caught.value.running.startswith("nothing")
        assert (source.state, destination.state) == (RunState.SUSPENDED, RunState.RESET)
        assert work.queue.device_used_index > caught.value.snapshot.queues[0].base.avail_index


# --- the same errors, after they took effect, and through a socket ---


def tripping_late(base):
    """A disk whose ``trip_at``-th call of a hook is done, and then fails."""
    cls = tripping(base)
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


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("act", [migration, save_then_load])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_an_error_after_every_step_leaves_one_that_runs(act, side, base):
    """As a reply that is lost: the device did what it was told, and whoever told it hears of a failure."""
    cls = tripping_late(base)
    classes = (cls, base) if side == "source" else (base, cls)
    cls.trip_at = -1
    assert attempt(act, *classes) is None
    for number in range(1, cls.counted + 1):
        cls.trip_at = number
        attempt(act, *classes)


# --- the sink, at any byte, and the user, at any moment ---


@contextmanager
def files_of_at_most(size_bytes):
    """As a full disk or quota: a write beyond that fails (the signal that comes with it is ignored by Python)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_is_full_at_any_byte(tmp_path):
    path = tmp_path / "image"
    with lab("sim") as (source, _, work):
        # the disk is a file too
        work.disk.settle(work.disk.driver.drain())
        save_file(source, str(path), limits())
        whole = path.stat().st_size
        path.write_bytes(b"what was there")
        for size_bytes in (*range(0, 1200, 13), *range(1200, whole, whole // 50), whole - 1):
            with files_of_at_most(size_bytes), pytest.raises(ProcedureFailed, match="File too large") as caught:
                save_file(source, str(path), limits())
            assert (caught.value.running, source.state) == (source.name, RunState.RUNNING)
            assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"what was there"]
        save_file(source, str(path), limits())
        assert path.stat().st_size >= whole
        work.finish()


class Disturbed:
    """`channel.wait`, with a signal before its ``at``-th call."""

    def __init__(self, number, wait):
        self.number = number
        self.wait = wait
        self.calls = 0
        self.at = None

    def __call__(self, *words):
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(self.number)
        self.wait(*words)


@pytest.mark.parametrize("driver", ["sim", "vhost-user"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_step(number, driver, tmp_path, monkeypatch):
    """Enumerated: before each system call of the transfer the signal comes once, and its handler raises."""
    path = tmp_path / "image"
    disturbed = Disturbed(number, channel.wait)
    monkeypatch.setattr(channel, "wait", disturbed)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with lab(driver) as (source, _, work):
            path.write_bytes(b"what was there")
            # until one is done before its signal comes: how many calls it takes is a matter of how state arrives
            for disturbed.at in itertools.count(1):
                disturbed.calls = 0
                try:
                    save_file(source, str(path), limits())
                    break
                except KeyboardInterrupt:
                    assert source.state is RunState.RUNNING
                    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"what was there"]
            assert disturbed.at > 4
            work.finish()
    finally:
        signal.signal(number, before)


class NotResumed(WithoutState):
    """As a kernel before 6.3: it goes on by a reset and a replay."""

    capabilities = WithoutState.capabilities - {Capability.RESUME}


class Alarming:
    """A disk that is told to do something when the user presses Ctrl-C, and a thread is there to take the signal."""

    hook = ""

    def _reset(self):
        self._press("_reset")
        super()._reset()

    def _resume(self):
        self._press("_resume")
        super()._resume()

    def _press(self, hook):
        if self.hook == hook:
            self.hook = ""
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)


@pytest.mark.parametrize(("base", "hook"), [(Sim, "_resume"), (NotResumed, "_reset")])
def test_an_interruption_while_the_source_goes_on_waits(base, hook):
    class Device(Alarming, base):
        pass

    with lab("sim", Device) as (source, _, work), shared_file(0) as file:
        source.hook = hook
        with pytest.raises(KeyboardInterrupt):
            save(source, file, limits())
        assert source.state is RunState.RUNNING
        work.finish()


class Forgetful(Sim):
    """It cannot resume, and does not take its own state back."""

    capabilities = frozenset(Capability) - {Capability.RESUME}
    forgets = False

    def _check_state(self):
        super()._check_state()
        if self.forgets and self.state is RunState.RESET:
            self.model.reset()
            raise VdpaBridgeError("check", device=self.name, why="a test forbids it")


def test_a_device_that_does_not_take_its_state_back_is_of_no_use():
    """It has another by now, and would go on with that."""
    with lab("sim", Forgetful) as (device, _, _):
        device.suspend()
        device.forgets = True
        with pytest.raises(ReplayFailed, match="its own state could not be given back"):
            resume(device)
        assert device.state is RunState.FAILED


class NotAtWork(Alarming, Sim):
    """Ctrl-C comes while it is told to resume, which it then refuses."""

    def _resume(self):
        self._press("_resume")
        raise VdpaBridgeError("resume", device=self.name, why="a test forbids it")


@pytest.mark.parametrize("during", ["the last step", "going back"])
def test_an_interruption_tells_what_was_found_out_meanwhile(during):
    """It comes when all is done, and has what the error would have said."""
    with lab("sim", NotAtWork) as (source, sim, _), shared_file(0) as file, made("sim") as (destination, _):
        source.hook = "_resume"
        destination.map(source.regions)
        destination.faults.refuse_transfer = True
        acts = {
            "the last step": lambda: save(source, file, limits()),
            "going back": lambda: migrate(source, destination, limits()),
        }
        with pytest.raises(KeyboardInterrupt) as caught:
            acts[during]()
        (note,) = caught.value.__notes__
        assert "running now: nothing" in note
        assert note.endswith("its queues stand where they stood: resume it")
        assert sim.state is not RunState.RUNNING


class AlarmingStart(Alarming, Sim):
    def _start(self):
        super()._start()
        self._press("_start")


@pytest.mark.parametrize("by", ["migration", "image"])
def test_an_interruption_while_the_destination_starts_comes_when_all_is_done(by):
    """It runs: to take that back would lose what it has done already."""
    with lab("sim") as (source, _, work), made("sim", AlarmingStart) as (destination, _), shared_file(0) as file:
        destination.hook = "_start"
        destination.map([work.memory.region])
        if by == "migration":
            with pytest.raises(KeyboardInterrupt):
                migrate(source, destination, limits())
            assert source.state is RunState.RESET
        else:
            save(source, file, limits(), stay_suspended=True)
            os.lseek(file, 0, os.SEEK_SET)
            with pytest.raises(KeyboardInterrupt):
                load(destination, file, limits(), work.eventfds)
        assert destination.state is RunState.RUNNING
        work.finish()


def test_going_back_has_a_deadline_where_the_devices_have_none():
    """A destination that never answers is not waited for without end."""

    left_s = []

    class Mute(WithoutState):
        def _start(self):
            super()._start()
            raise Tripped("start")

        def _reset(self):
            left_s.append(self.limit.left_s())
            raise DeadlineExceeded("reset", 1, device=self.name)

        def _close(self):
            self._reset = super()._reset
            super()._close()

        def _give_up(self):
            left_s.append(self.limit.left_s())
            super()._give_up()
            return False

    with lab("sim", WithoutState) as (source, _, work), made("sim", Mute, timeout_s=None) as (destination, _):
        destination.map([work.memory.region])
        with pytest.raises(ProcedureFailed, match="not known"):
            migrate(source, destination, limits())
        assert destination.timeout_s is None
    # what is asserted in there is taken for one more thing that went wrong
    assert len(left_s) >= 2
    assert all(left is not None and 0 < left <= transaction.GRACE_S for left in left_s), left_s


def test_memory_that_cannot_be_watched_leaves_no_descriptor(monkeypatch):
    """Out of descriptors just before the destination is started: it is not."""
    duplicates = itertools.count(1)
    real = os.dup

    def dup(fd):
        if next(duplicates) > 1:
            raise OSError(24, "Too many open files")
        return real(fd)

    with lab("sim", WithoutState) as (source, _, work), GuestMemory(4096, 0x9000_0000) as more:
        source.map([more.region])
        snapshot = DeviceSnapshot(2, 0, {}, b"")
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", dup)
            with pytest.raises(OSError, match="Too many"):
                Witness(snapshot, source.regions)
        work.finish()


def test_a_replay_that_lasts_too_long_may_yet_end():
    """By a reset and a replay, the device may start after all: "nothing runs" would have another one started."""

    class Late(NotResumed):
        def _start(self):
            super()._start()
            self.starts += 1
            if self.starts > 1:
                raise DeadlineExceeded("start", 1, device=self.name)

        starts = 0

    with lab("sim", Late) as (source, _, work), shared_file(0) as file:
        with pytest.raises(ProcedureFailed) as caught:
            save(source, file, limits())
        assert caught.value.running.startswith("not known: ")
        assert caught.value.advice is Advice.SUSPEND
        source.starts = 0
        source.suspend()
        resume(source)
        work.finish()


class Mute(WithoutState):
    """Who does not answer when its state is asked for has the procedure's time, and no more."""

    capabilities = frozenset(Capability)
    waited_s = None

    def _set_state_fd(self, direction, phase, fd):
        os.close(fd)
        self.waited_s = self.limit.left_s()
        raise Tripped("set state")


def test_asking_for_state_has_a_deadline():
    with lab("sim", Mute) as (source, _, work), shared_file(0) as file:
        source.timeout_s = None
        with pytest.raises(ProcedureFailed):
            save(source, file, limits(timeout_s=7))
        assert 0 < source.waited_s <= 7
        source.timeout_s = 5
        work.finish()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_state_that_one_of_the_two_takes_for_damaged(side):
    """All bytes have gone, and one of the two says at the end that they are not its state."""
    with lab("sim") as (source, _, work), made("sim") as (destination, _):
        destination.map([work.memory.region])
        (source if side == "source" else destination).faults.fail_check = True
        with pytest.raises(ProcedureFailed, match="told to fail") as caught:
            migrate(source, destination, limits())
        assert caught.value.running == source.name
        assert (source.state, destination.state) == (RunState.RUNNING, RunState.RESET)
        work.finish()


def test_where_no_time_is_left_nothing_is_begun():
    class Counting(Sim):
        asked = 0

        def _suspend(self, *, drain):
            type(self).asked += 1
            super()._suspend(drain=drain)

    with lab("sim", Counting) as (source, _, work), shared_file(0) as file:
        with pytest.raises(ProcedureFailed, match="no time is left") as caught:
            save(source, file, limits(timeout_s=0))
        assert (Counting.asked, caught.value.running) == (0, source.name)
        work.finish()
