"""What a procedure has done: its steps, each with its time, for people and for diagrams."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..device import Device

__all__ = ["Report", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step; its times are of the machine's monotonic clock, the same in every process."""

    name: str
    begin_s: float
    end_s: float
    failed: str = ""


@dataclass(slots=True)
class Report:
    """What was done, and the results. Steps that undo something begin with ``undo: ``."""

    steps: list[Step] = field(default_factory=list)
    state_bytes: int = 0
    """The size of the device's own state."""
    copied_by: str = ""
    """How the state was moved: a system call's name, or that it was read and written, as an image's digest needs."""
    digest: bytes = b""
    """The image's digest, if there is an image."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note the body as a step, also if it raises."""
        begin_s = time.monotonic()
        failed = ""
        try:
            yield
        except BaseException as error:
            failed = str(error) or type(error).__name__
            raise
        finally:
            self.steps.append(Step(name, begin_s, time.monotonic(), failed))

    @contextmanager
    def watching(self, device: Device) -> Iterator[None]:
        """Note the parts of what ``device`` does in the body as steps of their own."""
        before = device.observer
        device.observer = lambda name, begin_s, end_s: self.steps.append(Step(name, begin_s, end_s))
        try:
            yield
        finally:
            device.observer = before

    def seconds(self, name: str) -> float:
        """How long the steps called ``name`` took together."""
        return sum(step.end_s - step.begin_s for step in self.steps if step.name == name)
