"""The situation after a procedure that failed: what runs, how that is known, and what to do."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from ...device import Device
from ...errors import VdpaBridgeError
from ..report import Report
from ..snapshot import DeviceSnapshot

__all__ = ["NOTHING", "UNKNOWN", "Advice", "Outcome", "ProcedureFailed"]

#: What `ProcedureFailed.running` says if no device runs, and what it begins with if that is not known.
NOTHING, UNKNOWN = "nothing", "not known"


class Advice(Enum):
    """What to do after a failure. Each is safe in every case: none can make two devices run."""

    AGAIN = "nothing was lost; fix the cause, and do it again"
    OTHER_DESTINATION = "nothing was lost; fix the cause, reset the destination or take another, and do it again"
    DONE = "it was done before that; nothing has to be undone"
    AS_BEFORE = "it is as it was before"
    ANOTHER = "the device has not started; another can be given the image"
    RESUME = "its queues stand where they stood: resume it"
    RESTORE = "restore the error's snapshot on this device or another"
    RESET = "have the guest reset its device"
    SUSPEND = "when it answers again, suspend and resume it; or end its process, and have the guest reset its device"
    END = "end its process, then have the guest reset its device"


class Outcome(NamedTuple):
    """What runs after a failed procedure, and what to do."""

    running: str
    advice: Advice


class ProcedureFailed(VdpaBridgeError):
    """A procedure that failed.

    ``report`` has its steps and those that undid it; ``running`` is the device that is at work now, ``nothing``, or
    ``not known: …`` if that could not be proved; ``advice`` says what to do, for programs (`Advice`) and in words.
    ``snapshot`` has the queues' positions, if they were known.
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
        super().__init__(what, device=device.name, why=str(cause) or type(cause).__name__, hint=described(outcome))
        self.report = report
        self.running = outcome.running
        self.advice = outcome.advice
        self.snapshot = snapshot


def described(outcome: Outcome) -> str:
    """``outcome`` in words."""
    return f"running now: {outcome.running}; {outcome.advice.value}"
