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
    if left_s is None:
        yield
        return
    with _timeout(device, left_s if before is None else min(before, left_s)):
        yield


@contextmanager
def patient(device: Device) -> Iterator[None]:
    """Let ``device`` have a deadline, whatever its own is."""
    with _timeout(device, GRACE_S if device.timeout_s is None else device.timeout_s):
        yield


@contextmanager
def _timeout(device: Device, timeout_s: float) -> Iterator[None]:
    before = device.timeout_s
    device.timeout_s = timeout_s
    try:
        yield
    finally:
        # unless somebody in a hurry has set another one meanwhile
        if device.timeout_s == timeout_s:
            device.timeout_s = before
