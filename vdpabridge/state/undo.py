"""Going back: what a procedure that failed puts right, in an order that never lets two devices run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from ..device import Capability, Device, RunState
from ..errors import VdpaBridgeError
from .channel import Limits
from .replay import resume
from .report import Report
from .snapshot import DeviceSnapshot

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
        self.starting = False
        """Whether the destination was told to start: it may have done work."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        running = self._go_back()
        if isinstance(error, Exception):
            raise self._failed(error, running) from error

    def resume_source(self, name: str) -> None:
        """Let the source go on, if it was at work. Raises `ProcedureFailed`."""
        if self._source is not None and self._was_running:
            try:
                with self.report.step(name):
                    resume(self._source)
            except Exception as error:
                raise self._failed(error, _NOTHING) from error

    def try_step(self, name: str, act: Callable[[], object]) -> bool:
        """Do ``act`` as a step; whether it went well. Its error is in the report."""
        try:
            with self.report.step(name):
                act()
        except Exception:  # noqa: BLE001  # one step of going back must not keep the others from being done
            return False
        return True

    def _failed(self, error: Exception, running: str) -> ProcedureFailed:
        device = self._source or self._destination
        if device is None:
            raise error
        return ProcedureFailed(self._what, device, error, report=self.report, running=running, snapshot=self.snapshot)

    def _go_back(self) -> str:
        """What runs after it."""
        with uninterrupted():
            destination = self._destination
            if destination is not None:
                has_worked = self.starting and self._has_worked(destination)
                if not self.try_step("undo: reset the destination", destination.reset):
                    return f"not known: {destination.name} does not answer, and may have started; end it first"
                if has_worked and self._source is not None:
                    return f"{_NOTHING}: {destination.name} had begun to work, which the source would do again"
            return _NOTHING if self._source is None else self._bring_back(self._source)

    def _has_worked(self, destination: Device) -> bool:
        """Whether a destination whose start failed stands elsewhere than it was put."""
        if self.snapshot is None or destination.state is not RunState.CONFIGURED:
            return False
        queues = self.snapshot.queues
        same: list[bool] = []

        def compare() -> None:
            same.append(all(destination.get_base(index) == queue.base for index, queue in queues.items()))

        return not (self.try_step("undo: see whether it has worked", compare) and all(same))

    def _bring_back(self, source: Device) -> str:
        if Capability.DEVICE_STATE in source.capabilities and source.state in (RunState.CONFIGURED, RunState.SUSPENDED):
            self.try_step("undo: abandon the transfer", source.abandon_state)
        if not self._was_running:
            return _NOTHING
        # a suspend that failed late may have stopped some queues, or all, and not said so
        if source.state is RunState.RUNNING and not self.try_step("undo: end the suspend", source.suspend):
            return f"not known: {source.name} does not answer; its suspend was not brought to an end"
        if self.try_step("undo: resume", lambda: resume(source)):
            return source.name
        return _NOTHING


@contextmanager
def within(device: Device, limits: Limits) -> Iterator[None]:
    """Let ``device`` wait no longer than ``limits`` allow."""
    before = device.timeout_s
    left_s = limits.deadline.left_s()
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
