"""What callers have told a device, and the descriptors that it owns because of that: the same for every driver."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TypeVar

from ..errors import DeadlineExceeded, DeviceFailed, VdpaBridgeError
from ..linux.deadline import TimeLimit
from .hooks import DriverHooks
from .rules import Operation, RunState
from .values import DirtyLog, InflightRegion, MemoryRegion, QueueRecord

__all__ = ["DeviceCore"]

Shared = TypeVar("Shared", DirtyLog, InflightRegion)


class DeviceCore(DriverHooks):
    """The records of a device; `vdpabridge.device.Device` is the interface."""

    def __init__(self, name: str, limit: TimeLimit) -> None:
        self.name = name
        self.limit = limit
        """Bounds each operation; the driver's own waits use it too."""
        self.accepted_features = 0
        self.queues: dict[int, QueueRecord] = {}
        self.regions: list[MemoryRegion] = []
        """What is mapped, with duplicates of the descriptors, owned by the device."""
        self.config_call: int | None = None
        """A duplicate of the eventfd for configuration changes, owned by the device."""
        self.dirty_log: DirtyLog | None = None
        """With a duplicate of the descriptor, owned by the device; so is that of `inflight`."""
        self.inflight: InflightRegion | None = None
        self.failure = ""
        self.observer: Callable[[str, float, float], None] | None = None
        """Called after a part of an operation that takes its own time: with a name, begin and end on the monotonic
        clock."""
        self.undrained = False
        """Whether it was stopped with requests that it has taken and not answered (``drain=False``)."""
        self.state_version = 0
        """Another number whenever the device's own state was replaced, by a reset or by a load; the same after a reset
        that ended with the device having its own state again."""
        self._loading = False
        """Whether a load of its own state was begun, and not checked."""
        self._state = RunState.RESET
        self._closed = False

    @property
    def timeout_s(self) -> float | None:
        """Bounds each operation as a whole; None waits for ever."""
        return self.limit.timeout_s

    @timeout_s.setter
    def timeout_s(self, timeout_s: float | None) -> None:
        self.limit.timeout_s = timeout_s

    def _require_time(self, what: str) -> None:
        """Raise `DeadlineExceeded` if no time is left before the start: then the device is not asked at all."""
        if self.limit.passed:
            timeout_s, why = self.limit.deadline().timeout_s or 0, "no time is left"
            raise DeadlineExceeded(what, timeout_s, device=self.name, why=why, nothing_done=True)

    def _fail(self, why: str) -> DeviceFailed:
        """Note that the device gave up; returns the error for the driver to raise."""
        self._state = RunState.FAILED
        self.failure = why
        return DeviceFailed("the device failed", device=self.name, why=why, hint="reset it, and look at the kernel log")

    @contextmanager
    def _leading_to(self, after: RunState) -> Iterator[None]:
        """The body leads to ``after``, a state in which the device is at work. If the body raises, the state is
        ``after`` too, unless the device is certainly idle: the error of a request does not tell whether it took
        effect."""
        before = self._state
        try:
            yield
            self._state = after
        except BaseException as error:
            if self._state is before and not getattr(error, "nothing_done", False):
                # set this first: if something interrupts the question below, the safe assumption stays
                self._state = after
                if self.is_idle():
                    self._state = before
            raise

    def _drop_load(self) -> None:
        """A load that was begun will not be checked."""
        if self._loading and self._keeps_what_is_abandoned:
            self.state_version += 1
        self._loading = False

    @property
    def _reset_loses_state(self) -> bool:
        return True

    @contextmanager
    def _resetting(self) -> Iterator[None]:
        """The body resets the device. If it raises, it is not known how much was done: the device counts as failed
        until another reset completes."""
        if self._reset_loses_state:
            self.state_version += 1
        try:
            yield
        except BaseException as error:
            if self._state is not RunState.FAILED and not getattr(error, "nothing_done", False):
                self._fail(f"a reset did not complete: {str(error) or type(error).__name__}")
            raise

    def is_idle(self) -> bool:
        """Whether it is certain that no part of the device is at work, whatever it was told; legal at any time.

        False if that is not known. Raises nothing: a device that does not answer is not known to be idle.
        """
        try:
            return self._is_idle()
        except (VdpaBridgeError, OSError):
            return False

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Tell the observer how long the body takes, if it does not raise."""
        begin_s = time.monotonic()
        yield
        if self.observer is not None:
            self.observer(name, begin_s, time.monotonic())

    def _record(self, index: int) -> QueueRecord:
        return self.queues.setdefault(index, QueueRecord())

    # --- descriptors: duplicates, made before the device gets them and closed if it refuses ---

    @contextmanager
    def _adopting(self, regions: Sequence[MemoryRegion]) -> Iterator[list[MemoryRegion]]:
        """``regions`` with duplicates of their descriptors; they count as mapped if the body does not raise."""
        with ExitStack() as duplicates:
            own = [replace(region, fd=_kept(duplicates, region.fd)) for region in regions]
            yield own
            duplicates.pop_all()
        self.regions.extend(own)

    def _drop(self, regions: Sequence[MemoryRegion]) -> None:
        """Forget ``regions``, which were mapped, and close their descriptors."""
        self.regions = [region for region in self.regions if region not in regions]
        for region in regions:
            os.close(region.fd)

    @contextmanager
    def _adopting_config_call(self, eventfd: int | None) -> Iterator[None]:
        """Keep a duplicate of ``eventfd`` (borrowed) for configuration changes, if the body does not raise."""
        with _duplicate(eventfd) as duplicate:
            yield
        before, self.config_call = self.config_call, duplicate
        if before is not None:
            os.close(before)

    @contextmanager
    def _adopting_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> Iterator[None]:
        """Keep a duplicate of ``eventfd`` (borrowed) for queue ``index``, if the body does not raise."""
        with _duplicate(eventfd) as duplicate:
            yield
        eventfds = self._record(index).eventfds
        if (old := eventfds.pop(operation, None)) is not None:
            os.close(old)
        if duplicate is not None:
            eventfds[operation] = duplicate

    @contextmanager
    def _adopting_dirty_log(self, log: DirtyLog | None) -> Iterator[None]:
        """Keep ``log`` with a duplicate of its descriptor (borrowed), if the body does not raise."""
        with _own(log) as own:
            yield
        before, self.dirty_log = self.dirty_log, own
        _close(before)

    @contextmanager
    def _adopting_inflight(self, region: InflightRegion | None) -> Iterator[None]:
        """Keep ``region`` with a duplicate of its descriptor (borrowed), if the body does not raise."""
        with _own(region) as own:
            yield
        before, self.inflight = self.inflight, own
        _close(before)

    def _forget(self) -> None:
        """Forget what a reset forgets. Each descriptor leaves the records before it is closed: if an interruption led
        to a second close, the number could belong to another file by then."""
        log, self.dirty_log = self.dirty_log, None
        _close(log)
        inflight, self.inflight = self.inflight, None
        _close(inflight)
        for record in self.queues.values():
            while record.eventfds:
                os.close(record.eventfds.popitem()[1])
        config_call, self.config_call = self.config_call, None
        if config_call is not None:
            os.close(config_call)
        self.queues = {}
        self.accepted_features = 0
        self.failure = ""
        self.undrained = False

    @contextmanager
    def _letting_go(self) -> Iterator[None]:
        """The body closes the device; afterwards this object owns no descriptors."""
        self._closed = True
        try:
            yield
        finally:
            try:
                self._forget()
            finally:
                while self.regions:
                    os.close(self.regions.pop().fd)


@contextmanager
def _own(shared: Shared | None) -> Iterator[Shared | None]:
    """``shared`` with a duplicate of its descriptor, which is closed if the body raises."""
    with _duplicate(None if shared is None else shared.fd) as fd:
        yield None if shared is None or fd is None else replace(shared, fd=fd)


def _close(shared: DirtyLog | InflightRegion | None) -> None:
    if shared is not None:
        os.close(shared.fd)


def _kept(stack: ExitStack, fd: int) -> int:
    duplicate = os.dup(fd)
    stack.callback(os.close, duplicate)
    return duplicate


@contextmanager
def _duplicate(eventfd: int | None) -> Iterator[int | None]:
    duplicate = None if eventfd is None else os.dup(eventfd)
    try:
        yield duplicate
    except BaseException:
        if duplicate is not None:
            os.close(duplicate)
        raise
