"""Undoes a procedure that failed, in an order that never lets two devices run.

It says what runs only with proof: that a device answered, that its queues were stopped, that its process has ended, or
that the guest's rings show no work. An error of a request does not prove anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from ...device import Capability, Device, RunState
from ...linux.deadline import Deadline
from ...linux.signals import Deferral, uninterrupted
from ..replay import resume
from ..report import Report
from ..snapshot import DeviceSnapshot
from .outcome import NOTHING, UNKNOWN, Advice, Outcome, ProcedureFailed, described
from .witness import Evidence, Witness

__all__ = ["GRACE_S", "Transaction"]

#: The deadline for a device that has none of its own: the caller has waited long enough already.
GRACE_S = 30.0


class Transaction:
    """A context for a procedure; if its body raises, everything is undone.

    ``source`` is the device that was at work, ``destination`` the one that is to be; either may be missing. An error is
    raised as `ProcedureFailed`; an interruption (KeyboardInterrupt, SystemExit) as it is, with a note that says what a
    `ProcedureFailed` would, and its attributes. Signals that come during the undoing wait until that is done.
    """

    def __init__(self, what: str, source: Device | None, destination: Device | None) -> None:
        self._what = what
        self._source = source
        self._destination = destination
        self._was_running = source is not None and source.state is RunState.RUNNING
        self.report = Report()
        self.snapshot: DeviceSnapshot | None = None
        """Where the source stands, as soon as it is stopped."""
        self.suspending = False
        """Whether the source was told to stop."""
        self._witness: Witness | None = None
        self._starting = False
        self._done = False
        self._outcome: Outcome | None = None
        """How it has ended, once that is known."""

    def __enter__(self) -> Self:
        # a signal that comes as `__exit__` begins must not keep it from running
        self._deferral = Deferral(Transaction.__exit__)
        try:
            self._deferral.install()
        except BaseException:
            self._deferral.end()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        failed: ProcedureFailed | None = None
        try:
            try:
                if error is not None and not isinstance(error, ProcedureFailed):
                    failed = self._conclude(error)
            finally:
                self._let_go()
            if failed is not None:
                raise failed from error
        except BaseException as interruption:
            if interruption is not failed:
                # it came meanwhile, and does not say how this has ended
                self._tell(interruption, self._outcome_now())
            raise

    def _outcome_now(self) -> Outcome:
        """How it has ended, as far as that is known: the undoing was interrupted, too."""
        if self._outcome is not None or self._done:
            return self._after_the_end()
        names = " and ".join(device.name for device in (self._source, self._destination) if device is not None)
        return Outcome(f"{UNKNOWN}: undoing what {names} did was interrupted", Advice.END)

    def _let_go(self) -> None:
        try:
            if self._witness is not None:
                self._witness.close()
        finally:
            self._deferral.end()

    def _conclude(self, error: BaseException) -> ProcedureFailed | None:
        """Undo the procedure. Returns the error to raise; None if that is ``error`` itself."""
        outcome = self._outcome = self._after_the_end() if self._done else self._go_back(error)
        if isinstance(error, Exception):
            return self._failed(error, outcome)
        self._tell(error, outcome)
        return None

    def _tell(self, interruption: BaseException, outcome: Outcome) -> None:
        """Make ``interruption`` say what a `ProcedureFailed` would."""
        interruption.add_note(f"{self._what}: {described(outcome)}")
        told = {"running": outcome.running, "advice": outcome.advice, "snapshot": self.snapshot, "report": self.report}
        interruption.__dict__.update(told)

    def expect_work(self, device: Device, snapshot: DeviceSnapshot) -> None:
        """``device`` is about to be told to continue from ``snapshot``: from now on the guest's rings are watched."""
        if self._witness is None:
            self._witness = Witness(snapshot, device.regions)

    def expect_start(self, snapshot: DeviceSnapshot) -> None:
        """The destination is about to be told to start from ``snapshot``: from now on it may do work."""
        if self._destination is not None:
            self.expect_work(self._destination, snapshot)
        self._starting = True

    def resume_source(self, name: str) -> None:
        """Resume the source, if it was at work: the last step. Raises `ProcedureFailed`."""
        if self._source is not None and self._was_running:
            with uninterrupted(), with_a_deadline(self._source):
                error, outcome = self._resume(self._source, name)
                self._done = True
                if error is not None:
                    self._outcome = outcome
            if error is not None:
                raise self._failed(error, outcome, f"{self._what} is done, but not {name}") from error

    def commit(self) -> None:
        """The destination is where it ought to be. Nothing is undone any more, and the source must not run: it is
        reset. Whether that succeeded is only in the report."""
        self._done = True
        if self._source is not None:
            with with_a_deadline(self._source):
                self.try_step("reset the source", self._source.reset)

    def try_step(self, name: str, act: Callable[[], object]) -> Exception | None:
        """Do ``act`` as a step. Returns its error, if any, which is in the report too."""
        try:
            with self.report.step(name):
                act()
        except Exception as error:  # noqa: BLE001  # a step that fails must not keep the others from being done
            return error
        return None

    def _failed(self, error: Exception, outcome: Outcome, what: str = "") -> ProcedureFailed:
        device = self._source or self._destination
        if device is None:
            raise error
        return ProcedureFailed(
            what or self._what, device, error, report=self.report, outcome=outcome, snapshot=self.snapshot
        )

    def _after_the_end(self) -> Outcome:
        if self._outcome is not None:
            return self._outcome
        device = self._destination or self._source
        runs = device is not None and device.state is RunState.RUNNING
        return Outcome(device.name if device is not None and runs else NOTHING, Advice.DONE)

    def _go_back(self, cause: BaseException) -> Outcome:
        if self._destination is not None:
            with with_a_deadline(self._destination):
                hindrance = self._stop(self._destination)
            if hindrance is not None:
                return hindrance
        if self._source is None:
            return Outcome(NOTHING, Advice.ANOTHER)
        with with_a_deadline(self._source):
            return self._bring_back(self._source, cause)

    def _stop(self, destination: Device) -> Outcome | None:
        """Stop ``destination``. Returns why the source must not resume; None if it may."""
        name = destination.name
        error = self.try_step("undo: reset the destination", destination.reset)
        # a device that was not told to start cannot have worked
        if not self._starting:
            return None
        if error is not None:
            stopped: list[bool] = []
            self.try_step("undo: give the destination up", lambda: stopped.append(destination.give_up()))
            if stopped != [True]:
                return Outcome(f"{UNKNOWN}: {name} does not answer, and may have started", Advice.END)
        if (seen := self._evidence()) is not Evidence.NONE:
            running = (
                f"{NOTHING}: {name} has, or may have, begun to work; the source would do that work again ({seen.value})"
            )
            return Outcome(running, Advice.RESET)
        return None

    def _evidence(self) -> Evidence:
        """Evidence of work since the snapshot. Before the rings were watched, no device could do any."""
        return Evidence.NONE if self._witness is None else self._witness.evidence()

    def _bring_back(self, source: Device, cause: BaseException) -> Outcome:
        refused = getattr(cause, "nothing_done", False)
        if self._was_running and source.state is RunState.RUNNING and (refused or not self.suspending):
            return self._runs(source)
        if source.state is RunState.FAILED:
            return self._of_failed(source)
        if Capability.DEVICE_STATE in source.capabilities and source.state in (RunState.CONFIGURED, RunState.SUSPENDED):
            self.try_step("undo: abandon the transfer", source.abandon_state)
        if not self._was_running:
            return Outcome(f"{NOTHING}: {source.name} is {source.state.value}", Advice.AS_BEFORE)
        # a suspend that failed late may have stopped some or all queues without saying so
        if source.state is RunState.RUNNING:
            error = self.try_step("undo: end the suspend", source.suspend)
            if getattr(error, "nothing_done", False):
                return self._runs(source)
            if error is not None:
                return self._unanswered(source, "was told to stop, and may have")
        return self._resume(source, "undo: resume")[1]

    def _resume(self, source: Device, name: str) -> tuple[Exception | None, Outcome]:
        """Resume ``source``. Returns what went wrong, if anything, and what runs after it."""
        error = self.try_step(name, lambda: self._watch_and_resume(source))
        if error is None:
            return None, self._runs(source)
        if source.state is RunState.RUNNING:
            return error, self._unanswered(source, "may have resumed, or may yet")
        if source.state is RunState.FAILED:
            return error, self._of_failed(source)
        return error, self._stands_still(source, str(error))

    def _watch_and_resume(self, source: Device) -> None:
        if self.snapshot is not None:
            self.expect_work(source, self.snapshot)
        resume(source)

    def _unanswered(self, source: Device, what: str) -> Outcome:
        """``source`` is assumed to run, without proof."""
        if source.state is RunState.FAILED:
            return self._of_failed(source)
        return Outcome(f"{UNKNOWN}: {source.name} does not answer; it {what}", Advice.SUSPEND)

    def _of_failed(self, source: Device) -> Outcome:
        if not source.is_idle():
            # nothing else can stop it, and a reset that succeeds is proof
            self.try_step("undo: reset the source, which failed", source.reset)
        if not source.is_idle():
            why = f"{source.name} failed: {source.failure}; whether it has stopped is not certain"
            return Outcome(f"{UNKNOWN}: {why}", Advice.END)
        return self._stands_still(source, f"{source.name} failed: {source.failure}")

    def _stands_still(self, source: Device, why: str) -> Outcome:
        """It is certain that ``source`` does not run."""
        running = f"{NOTHING}: {why}"
        if self.snapshot is None or self._evidence() is not Evidence.NONE:
            # where its queues stand is not known
            return Outcome(running, Advice.RESET)
        if source.state is RunState.SUSPENDED:
            return Outcome(running, Advice.RESUME)
        # with a state of its own, its queues alone are not enough
        return Outcome(running, Advice.RESET if Capability.DEVICE_STATE in source.capabilities else Advice.RESTORE)

    def _runs(self, source: Device) -> Outcome:
        failed = self._destination is not None and self._destination.state is RunState.FAILED
        return Outcome(source.name, Advice.OTHER_DESTINATION if failed else Advice.AGAIN)


@contextmanager
def with_a_deadline(device: Device) -> Iterator[None]:
    """Give ``device`` a deadline, if it has none of its own."""
    if device.timeout_s is not None:
        yield
        return
    with device.limit.within(Deadline(GRACE_S)):
        yield
