"""How long a device is waited for: no longer than a procedure may take, and never without end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..device import Device
from ..errors import DeadlineExceeded
from .channel import Limits

__all__ = ["GRACE_S", "patient", "within"]

#: For a device that has no deadline of its own: whoever goes back has waited long enough already.
GRACE_S = 30.0


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
def patient(device: Device) -> Iterator[None]:
    """Let ``device`` have a deadline, whatever its own is."""
    before = device.timeout_s
    device.timeout_s = GRACE_S if before is None else before
    try:
        yield
    finally:
        device.timeout_s = before
