"""Going back: what a procedure that failed puts right, in an order that never lets two devices run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from ..device import Capability, Device, RunState
from ..errors import DeadlineExceeded, VdpaBridgeError
from .channel import Limits
from .replay import resume
from .report import Report
from .snapshot import DeviceSnapshot
from .witness import Witness

__all__ = ["ProcedureFailed", "Undo", "uninterrupted", "within"]

_NOTHING = "nothing"


class ProcedureFailed(VdpaBridgeError):
    """A procedure that did not come to its end.

    ``report`` has its steps and those of going back; ``running`` is the device that goes on now, ``nothing``, or
    ``not known: …`` where a device did not answer. ``snapshot`` has the queues' positions, if they were known.
    """

    def __init__(
        self,
        what: str,
        device: Device,
        cause: BaseException,
        *,
        report: Report,
        running: str,
        snapshot: DeviceSnapshot | None = None,
    ) -> None:
        why = str(cause) or type(cause).__name__
        super().__init__(what, device=device.name, why=why, hint=f"running now: {running}")
        self.report = report
        self.running = running
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                return
            running = self._go_back(error)
        finally:
            if self._witness is not None:
                self._witness.close()
        if isinstance(error, Exception):
            raise self._failed(error, running) from error

    def expect_start(self, destination: Device, snapshot: DeviceSnapshot) -> None:
        """``destination`` is about to be told to start where ``snapshot`` was taken: from now on it may do work."""
        self._witness = Witness(snapshot, destination.regions)

    def resume_source(self, name: str) -> None:
        """Let the source go on, if it was at work. Raises `ProcedureFailed`."""
        if self._source is not None and self._was_running:
            error, running = self._resume(self._source, name)
            if error is not None:
                raise self._failed(error, running) from error

    def try_step(self, name: str, act: Callable[[], object]) -> Exception | None:
        """Do ``act`` as a step. Returns its error, if any, which is in the report too."""
        try:
            with self.report.step(name):
                act()
        except Exception as error:  # noqa: BLE001  # one step of going back must not keep the others from being done
            return error
        return None

    def _failed(self, error: Exception, running: str) -> ProcedureFailed:
        device = self._source or self._destination
        if device is None:
            raise error
        return ProcedureFailed(self._what, device, error, report=self.report, running=running, snapshot=self.snapshot)

    def _go_back(self, cause: BaseException) -> str:
        """What runs after it."""
        with uninterrupted():
            if self._destination is not None and (hindrance := self._stop(self._destination)):
                return hindrance
            return _NOTHING if self._source is None else self._bring_back(self._source, cause)

    def _stop(self, destination: Device) -> str:
        """See to it that ``destination`` does nothing more; why the source must not go on, if so."""
        if self.try_step("undo: reset the destination", destination.reset) is not None:
            stopped: list[bool] = []
            self.try_step("undo: give the destination up", lambda: stopped.append(destination.give_up()))
            # who was not told to start has nothing to do it with
            if self._witness is not None and stopped != [True]:
                return f"not known: {destination.name} does not answer, and may have started; end it first"
        if self._witness is not None and self._witness.has_seen_work():
            return f"{_NOTHING}: {destination.name} had begun to work, which the source would do again"
        return ""

    def _bring_back(self, source: Device, cause: BaseException) -> str:
        if self._was_running and not self.suspending and source.state is RunState.RUNNING:
            return source.name
        if source.state is RunState.FAILED:
            if not self.suspended and isinstance(cause, DeadlineExceeded):
                return f"not known: {source.name} does not answer; it may have stopped or not"
            return f"{_NOTHING}: {source.name} failed: {source.failure}"
        if Capability.DEVICE_STATE in source.capabilities and source.state in (RunState.CONFIGURED, RunState.SUSPENDED):
            self.try_step("undo: abandon the transfer", source.abandon_state)
        if not self._was_running:
            return _NOTHING
        # a suspend that failed late may have stopped some queues, or all, and not said so
        if source.state is RunState.RUNNING and self.try_step("undo: end the suspend", source.suspend):
            return f"not known: {source.name} does not answer; its suspend was not brought to an end"
        return self._resume(source, "undo: resume")[1]

    def _resume(self, source: Device, name: str) -> tuple[Exception | None, str]:
        """What went wrong, if anything, and what runs after it."""
        error = self.try_step(name, lambda: resume(source))
        if error is None:
            return None, source.name
        if isinstance(error, DeadlineExceeded):
            return error, f"not known: {source.name} does not answer; it may have gone on, or may yet"
        return error, f"{_NOTHING}: {error}"


@contextmanager
def within(device: Device, limits: Limits) -> Iterator[None]:
    """Let ``device`` wait no longer than ``limits`` allow. Raises `DeadlineExceeded` where no time is left."""
    before = device.timeout_s
    left_s = limits.deadline.left_s()
    if limits.deadline.passed:
        # not asked at all, it need not be put right
        raise DeadlineExceeded("transfer", limits.deadline.timeout_s or 0, device=device.name, why="no time is left")
    if left_s is not None:
        device.timeout_s = left_s if before is None else min(before, left_s)
    try:
        yield
    finally:
        device.timeout_s = before


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the body is done; in the main thread, the only one that they interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
