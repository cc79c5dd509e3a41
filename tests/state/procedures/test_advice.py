"""Every error's own advice is followed, by a program, and the devices that are at work are counted: never two.

Enumerated: each call of a driver's hook that a procedure makes fails, before or after it took effect, once or together
with another; with an error, a deadline or an interruption. Then the guest's data is looked at.
"""

import errno
import itertools
import os
from contextlib import ExitStack

import pytest

from vdpabridge.device import Capability, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import DeadlineExceeded, KernelError, VdpaBridgeError
from vdpabridge.state.procedures import ProcedureFailed, load, migrate, save
from vdpabridge.state.procedures.outcome import Advice
from vdpabridge.state.snapshot import restore

from ...support.disk_lab import lab, limits, made
from ...support.transitions import shared_file

HOOKS = (
    *("_accept_features", "_read_config", "_set_queue", "_set_base", "_get_base", "_bind_eventfd", "_enable_queue"),
    *("_start", "_resume", "_suspend", "_reset", "_set_state_fd", "_check_state", "_abandon_state"),
)
KINDS = {
    "error": lambda name: KernelError(errno.EIO, name, device="the device"),
    "refusal": lambda name: KernelError(errno.EOPNOTSUPP, name, device="the device"),
    "deadline": lambda name: DeadlineExceeded(name, 1, device="the device"),
    "interruption": lambda _name: KeyboardInterrupt(),
}


#: A refusal is one of something that was not begun.
TIMES = [(kind, late) for kind in KINDS for late in (False, True) if not (late and kind == "refusal")]


class Plan:
    """Which calls of hooks fail, by number, how, and whether before or after they took effect."""

    def __init__(self, kind="error", late=False, at=()):
        self.kind = kind
        self.late = late
        self.at = set(at)
        self.calls = 0

    def apply(self, name, call, words):
        self.calls += 1
        if self.calls not in self.at:
            return call()
        if self.late:
            call()
        elif name == "_set_state_fd":
            os.close(words[2])
        raise KINDS[self.kind](name)


def faulty(plan, *, with_state, is_idle_known):
    """A disk whose hooks fail by ``plan``; without ``is_idle_known`` nobody can prove that it does nothing."""

    class Faulty(Sim):
        capabilities = frozenset(Capability) - (set() if with_state else {Capability.DEVICE_STATE})

        def _is_idle(self):
            return is_idle_known and super()._is_idle()

    def hook(name):
        def act(self, *words, **options):
            return plan.apply(name, lambda: getattr(super(Faulty, self), name)(*words, **options), words)

        return act

    for name in HOOKS:
        setattr(Faulty, name, hook(name))
    return Faulty


def at_work(*devices):
    """The devices whose thread processes rings, whatever anybody thinks of them."""
    return [each for each in devices if each._engine.at_work]


def advice_of(error):
    """(what runs, advice) as ``error`` says."""
    if isinstance(error, ProcedureFailed):
        return error.running, error.advice
    (note,) = error.__notes__
    return next((note.split("running now: ")[1].split("; ")[0], each) for each in Advice if each.value in note)


def follow(advice, source, destination, error, work):
    """Do what the advice says, by the book; whether the guest's requests are to be done after it."""
    if advice in (Advice.AGAIN, Advice.AS_BEFORE, Advice.DONE):
        return advice is not Advice.AS_BEFORE
    if advice is Advice.OTHER_DESTINATION:
        destination.reset()
        return True
    if advice is Advice.ANOTHER:
        # whoever has the image has the source, stopped
        source.resume()
    elif advice is Advice.RESUME:
        source.resume()
    elif advice is Advice.RESTORE:
        source.reset()
        restore(source, error.snapshot, work.eventfds)
        source.start()
    elif advice is Advice.SUSPEND:
        source.suspend()
        source.resume()
    else:
        # the guest's driver resets its device, and its requests with it
        for device in (source, destination):
            device.close() if advice is Advice.END else device.reset()
        assert not at_work(source, destination)
        return False
    return True


def do_migrate(source, destination, _work, _stack):
    migrate(source, destination, limits())


def do_save(source, _destination, _work, stack):
    save(source, stack.enter_context(shared_file(0)), limits())


def do_load(source, destination, work, stack):
    file = stack.enter_context(shared_file(0))
    save(source, file, limits(), stay_suspended=True)
    os.lseek(file, 0, os.SEEK_SET)
    load(destination, file, limits(), work.eventfds)


PROCEDURES = {"migrate": do_migrate, "save": do_save, "load": do_load}


def attempt(procedure, plans, *, with_state, is_idle_known):
    """Run it once; whether it failed."""
    classes = [faulty(plan, with_state=with_state, is_idle_known=is_idle_known) for plan in plans]
    at = [plan.at for plan in plans]
    for plan in plans:
        plan.at = set()
    with ExitStack() as stack:
        source, _, work = stack.enter_context(lab("sim", classes[0]))
        destination, _ = stack.enter_context(made("sim", classes[1]))
        destination.map([work.memory.region])
        if not with_state:
            # one disk behind both
            os.dup2(source.model._fd, destination.model._fd, inheritable=False)
        for plan, numbers in zip(plans, at, strict=True):
            plan.calls, plan.at = 0, numbers
        failure = None
        try:
            PROCEDURES[procedure](source, destination, work, stack)
        except (VdpaBridgeError, KeyboardInterrupt) as error:
            failure = error
        for plan in plans:
            plan.counted, plan.at = plan.calls, set()
        running = at_work(source, destination)
        assert len(running) <= 1, f"two devices run after {failure!r}"
        if failure is None:
            work.finish()
            return False
        if not isinstance(failure, ProcedureFailed) and not hasattr(failure, "__notes__"):
            # found out before anything was done
            if source.state is RunState.SUSPENDED and procedure == "load":
                source.resume()
            assert at_work(source, destination) == [source]
            work.finish()
            return True
        claimed, advice = advice_of(failure)
        if not claimed.startswith("not known"):
            # both are called the same
            assert bool(running) == (not claimed.startswith("nothing")), f"{failure!r}: {claimed}"
        if follow(advice, source, destination, failure, work):
            assert len(at_work(source, destination)) == 1, f"after following {advice}"
            work.finish()
        return True


@pytest.mark.parametrize("is_idle_known", [True, False], ids=["proof", "no proof"])
@pytest.mark.parametrize("with_state", [True, False], ids=["with state", "without"])
@pytest.mark.parametrize(("kind", "late"), TIMES)
@pytest.mark.parametrize("procedure", PROCEDURES)
def test_the_advice_after_one_failure(procedure, kind, late, with_state, is_idle_known):
    options = {"with_state": with_state, "is_idle_known": is_idle_known}
    plain = [Plan(), Plan()]
    assert not attempt(procedure, plain, **options)
    for side in (0, 1):
        for number in range(1, plain[side].counted + 1):
            plans = [Plan(kind, late, [number] if side == each else []) for each in (0, 1)]
            try:
                attempt(procedure, plans, **options)
            except BaseException as error:
                error.add_note(f"side {side}, call {number}")
                raise


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["error", "deadline"])
@pytest.mark.parametrize("procedure", ["migrate", "save"])
def test_the_advice_when_going_back_fails_too(procedure, kind, late):
    """A first failure, and then each of the next calls of either side."""
    plain = [Plan(), Plan()]
    attempt(procedure, plain, with_state=True, is_idle_known=False)
    first = range(1, plain[0].counted + 1, 3)
    for number, again, side in itertools.product(first, range(1, 4), (0, 1)):
        plans = [Plan(kind, late, [number]), Plan(kind, late)]
        plans[side].at |= {number + again} if side == 0 else {again, again + 1}
        try:
            attempt(procedure, plans, with_state=True, is_idle_known=False)
        except BaseException as error:
            error.add_note(f"call {number}, then {again} of side {side}")
            raise


def test_every_advice_has_words_of_its_own():
    assert len({each.value for each in Advice}) == len(Advice)
    assert RunState.RUNNING.value == "running"
