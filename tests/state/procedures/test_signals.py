"""A signal at any line of what puts things right after a procedure has failed: what comes out says what runs."""

import errno
import signal
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import vdpabridge
from vdpabridge.device import Capability
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import VdpaBridgeError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.procedures import Advice, ProcedureFailed, migrate, save
from vdpabridge.state.procedures.transaction import Transaction

from ...support.disk_lab import limits
from ...support.fake_kernel import FakeKernel, Parent
from ...support.transitions import shared_file

HERE = tuple(str(Path(vdpabridge.__file__).parent / name) for name in ("state", "linux/signals.py"))


class Alarm:
    """Raises SIGINT before line number ``at`` that is run in vdpabridge/state and linux/signals.py, once it is armed."""

    def __init__(self, at):
        self.at = at
        self.lines = 0
        self.armed = False

    def trace(self, frame, event, _argument):
        name = frame.f_code.co_filename
        # Python looks for signals as a function begins, and when one that was called is done: not at a with statement
        # before its __exit__, nor at a raise, which are lines all the same
        if not name.startswith(HERE) or name.endswith(("save.py", "migrate.py")):
            return None
        if event == "line" and frame.f_code is Transaction.__exit__.__code__:
            return self.trace
        if self.armed and event in ("line", "call"):
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self.trace


@contextmanager
def traced(alarm):
    before = sys.gettrace()
    sys.settrace(alarm.trace)
    try:
        yield
    finally:
        sys.settrace(before)


def fail_once(what, parent, at):
    """A procedure that fails, and a signal at line ``at`` after that: (the lines there were, exception, runs)."""
    here, there = FakeKernel(parent), FakeKernel(parent)
    alarm = Alarm(at)

    def refuse(_argument):
        """Once."""
        alarm.armed = True
        there.__dict__.pop("vhost_set_vring_base", None)
        here.__dict__.pop("vhost_vdpa_get_config", None)
        return errno.EIO

    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(1 << 20))
        queue = stack.enter_context(SplitQueue(memory, 256))
        source = stack.enter_context(VhostVdpa.open("/dev/vhost-vdpa-0", system=here))
        destination = stack.enter_context(VhostVdpa.open("/dev/vhost-vdpa-0", system=there))
        file = stack.enter_context(shared_file(0))
        for device in (source, destination):
            device.map([memory.region])
        source.accept_features(1 << 32)
        queue.attach(source, 0)
        source.start()
        here.bases[0] = 7
        if what == "migrate":
            there.vhost_set_vring_base = refuse
            act = lambda: migrate(source, destination, limits())  # noqa: E731
        else:
            here.vhost_vdpa_get_config = refuse
            act = lambda: save(source, file, limits())  # noqa: E731
        error = None
        with traced(alarm):
            try:
                act()
            except (VdpaBridgeError, KeyboardInterrupt) as caught:
                error = caught
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return alarm.lines, error, (here._running, there._running), here.bases[0]


@pytest.mark.parametrize("resume", ["yes", "no"])
@pytest.mark.parametrize("what", ["migrate", "save"])
def test_a_signal_while_things_are_put_right(what, resume):
    parent = Parent(resume=resume)
    lines, *_ = fail_once(what, parent, 0)
    assert lines > 50
    silent = []
    for at in range(1, lines + 1):
        _, error, running, base = fail_once(what, parent, at)
        # the body may be left by the signal instead of by its own error; what is put right is the same
        assert running == (True, False), f"line {at}"
        assert base == 7
        told = getattr(error, "running", None)
        if told != "/dev/vhost-vdpa-0":
            silent.append((at, repr(error)))
    assert not silent


@contextmanager
def simulated(source_class, destination_class):
    """A disk at work, and another to move it to."""
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 64) as queue,
        source_class.blk(1 << 20, timeout_s=5) as source,
        destination_class.blk(1 << 20, timeout_s=5) as destination,
    ):
        for device in (source, destination):
            device.map([memory.region])
        source.accept_features(1 << 32)
        queue.attach(source, 0)
        source.start()
        yield source, destination


class Interrupting(Sim):
    """A signal that nobody has wait comes as it resumes."""

    def _resume(self):
        super()._resume()
        signal.raise_signal(signal.SIGUSR1)


class Refusing(Sim):
    def _check_state(self):
        super()._check_state()
        raise VdpaBridgeError("check", device=self.name, why="refused")


def test_what_is_not_known_is_not_told_as_known():
    """Something else than SIGINT and SIGTERM interrupts, while things are put right."""

    def end(*_words):
        raise SystemExit(1)

    before = signal.signal(signal.SIGUSR1, end)
    try:
        with simulated(Interrupting, Refusing) as (source, destination):
            with pytest.raises(SystemExit) as caught:
                migrate(source, destination, limits())
            assert caught.value.running.startswith("not known: ")
            assert caught.value.advice is Advice.END
            assert caught.value.snapshot is not None
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_source_that_was_not_told_to_stop_is_left_alone():
    class Watched(Sim):
        capabilities = frozenset(Capability) - {Capability.DEVICE_STATE}
        suspends = 0

        def _suspend(self, *, drain):
            self.suspends += 1
            super()._suspend(drain=drain)

    class Unwilling(Watched):
        def _set_queue(self, index, setup):
            raise VdpaBridgeError("set up", device=self.name, why="refused")

    with simulated(Watched, Unwilling) as (source, destination):
        with pytest.raises(ProcedureFailed) as caught:
            migrate(source, destination, limits())
        assert caught.value.running == source.name
        assert source.suspends == 0
