"""Going back: what a procedure that failed puts right, in an order that never lets two devices run."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from ..device import Capability, Device, RunState
from ..errors import DeadlineExceeded, VdpaBridgeError
from .interruptions import uninterrupted
from .patience import patient
from .replay import resume
from .report import Report
from .snapshot import DeviceSnapshot
from .witness import Witness

__all__ = ["ProcedureFailed", "Undo"]

_NOTHING, _UNKNOWN = "nothing", "not known"


class Outcome(NamedTuple):
    """What a failed procedure has left."""

    running: str
    advice: str


class ProcedureFailed(VdpaBridgeError):
    """A procedure that did not come to its end.

    ``report`` has its steps and those of going back; ``running`` is the device that goes on now, ``nothing``, or
    ``not known: …`` where a device did not answer; ``advice`` says what to do. ``snapshot`` has the queues' positions,
    if they were known.
    """

    def __init__(
        self,
        what: str,
        device: Device,
        cause: BaseException,
        *,
        report: Report,
        outcome: Outcome,
        snapshot: DeviceSnapshot | None = None,
    ) -> None:
        why = str(cause) or type(cause).__name__
        hint = f"running now: {outcome.running}; {outcome.advice}"
        super().__init__(what, device=device.name, why=why, hint=hint)
        self.report = report
        self.running = outcome.running
        self.advice = outcome.advice
        self.snapshot = snapshot


class Undo:
    """A context in which a procedure works; where its body raises, everything goes back.

    ``source`` is the device that was at work, ``destination`` the one that is to be; either may be missing. What is no
    interruption (KeyboardInterrupt, SystemExit) comes out as `ProcedureFailed`.
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
        self.suspended = False
        """Whether it has said that it is stopped."""
        self._witness: Witness | None = None
        self._done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            if error is None or self._done or isinstance(error, ProcedureFailed):
                return
            outcome = self._go_back(error)
        finally:
            if self._witness is not None:
                self._witness.close()
        if isinstance(error, Exception):
            raise self._failed(error, outcome) from error

    def expect_start(self, destination: Device, snapshot: DeviceSnapshot) -> None:
        """``destination`` is about to be told to start where ``snapshot`` was taken: from now on it may do work."""
        self._witness = Witness(snapshot, destination.regions)

    def resume_source(self, name: str) -> None:
        """Let the source go on, if it was at work: the last step. Raises `ProcedureFailed`."""
        if self._source is not None and self._was_running:
            with uninterrupted(), patient(self._source):
                error, outcome = self._resume(self._source, name)
                self._done = True
            if error is not None:
                raise self._failed(error, outcome) from error

    def finish(self) -> None:
        """The destination is where it ought to be: nothing is put back any more, and the source, whatever becomes of
        it, must not run. How that went is in the report only."""
        self._done = True
        if self._source is not None:
            with patient(self._source):
                self.try_step("reset the source", self._source.reset)

    def try_step(self, name: str, act: Callable[[], object]) -> Exception | None:
        """Do ``act`` as a step. Returns its error, if any, which is in the report too."""
        try:
            with self.report.step(name):
                act()
        except Exception as error:  # noqa: BLE001  # one step of going back must not keep the others from being done
            return error
        return None

    def _failed(self, error: Exception, outcome: Outcome) -> ProcedureFailed:
        device = self._source or self._destination
        if device is None:
            raise error
        return ProcedureFailed(self._what, device, error, report=self.report, outcome=outcome, snapshot=self.snapshot)

    def _go_back(self, cause: BaseException) -> Outcome:
        with uninterrupted():
            if self._destination is not None:
                with patient(self._destination):
                    hindrance = self._stop(self._destination)
                if hindrance is not None:
                    return hindrance
            if self._source is None:
                return Outcome(_NOTHING, "the device has not started; another can be given the image")
            with patient(self._source):
                return self._bring_back(self._source, cause)

    def _stop(self, destination: Device) -> Outcome | None:
        """See to it that ``destination`` does nothing more; why the source must not go on, if so."""
        name = destination.name
        error = self.try_step("undo: reset the destination", destination.reset)
        # who was not told to start has nothing to do it with
        if error is not None and self._witness is not None:
            stopped: list[bool] = []
            self.try_step("undo: give the destination up", lambda: stopped.append(destination.give_up()))
            if stopped != [True]:
                advice = "end its process first, then resume the source"
                return Outcome(f"{_UNKNOWN}: {name} does not answer, and may have started", advice)
        if self._witness is not None and self._witness.has_seen_work():
            running = f"{_NOTHING}: {name} has, or may have, begun to work, which would be done again"
            return Outcome(running, "have the guest reset its device")
        return None

    def _bring_back(self, source: Device, cause: BaseException) -> Outcome:
        if self._was_running and not self.suspending and source.state is RunState.RUNNING:
            return self._goes_on(source)
        if source.state is RunState.FAILED:
            if not self.suspended and isinstance(cause, DeadlineExceeded):
                return self._unanswered(source, "may have stopped or not")
            return self._stands_still(f"{source.name} failed: {source.failure}")
        if Capability.DEVICE_STATE in source.capabilities and source.state in (RunState.CONFIGURED, RunState.SUSPENDED):
            self.try_step("undo: abandon the transfer", source.abandon_state)
        if not self._was_running:
            return Outcome(_NOTHING, f"{source.name} is {source.state.value}, as it was before")
        # a suspend that failed late may have stopped some queues, or all, and not said so
        if source.state is RunState.RUNNING and self.try_step("undo: end the suspend", source.suspend):
            return self._unanswered(source, "was told to stop, and may have")
        return self._resume(source, "undo: resume")[1]

    def _resume(self, source: Device, name: str) -> tuple[Exception | None, Outcome]:
        """What went wrong, if anything, and what runs after it."""
        error = self.try_step(name, lambda: resume(source))
        if error is None:
            return None, self._goes_on(source)
        if isinstance(error, DeadlineExceeded) or isinstance(error.__cause__, DeadlineExceeded):
            return error, self._unanswered(source, "may have gone on, or may yet")
        return error, self._stands_still(str(error))

    def _stands_still(self, why: str) -> Outcome:
        where = "restore the error's snapshot on this device or another; a state of its own may be lost"
        unknown = "where its queues stand is not known: have the guest reset its device"
        return Outcome(f"{_NOTHING}: {why}", unknown if self.snapshot is None else where)

    @staticmethod
    def _goes_on(source: Device) -> Outcome:
        return Outcome(source.name, "nothing was lost; mend the cause, and do it again")

    @staticmethod
    def _unanswered(source: Device, what: str) -> Outcome:
        advice = "when it answers again, suspend and resume it; or end its process"
        return Outcome(f"{_UNKNOWN}: {source.name} does not answer; it {what}", advice)
