"""What save, load and migrate have in common."""

from __future__ import annotations

from collections.abc import Set

from ...device import Capability, Device, RunState
from ...device.rules import ALTERNATIVES
from ...errors import MissingCapability, StateError, VdpaBridgeError
from ..losses import Loss, require_accepted, unsavable
from ..snapshot import DeviceSnapshot, capture
from .transaction import Transaction

__all__ = ["begin", "require_savable", "start_from", "suspend"]


def begin(
    device: Device, what: str, accept: Set[Loss], destination: Device | None = None, *, resumes: bool = True
) -> Transaction:
    """The transaction that undoes ``what`` if it fails. Raises as `require_savable`."""
    require_savable(device, what, accept, resumes=resumes)
    return Transaction(what, device, destination)


def require_savable(device: Device, what: str, accept: Set[Loss], *, resumes: bool = True) -> None:
    """Raise `StateError`, `MissingCapability` or `StateWouldBeLost` if ``device`` cannot be saved now.

    ``resumes``: the device resumes at the end. If it need not, it may lack RESUME: after a failure it gets its state
    back by a reset and replay.
    """
    if device.state not in (RunState.CONFIGURED, RunState.RUNNING, RunState.SUSPENDED):
        legal = (RunState.CONFIGURED.value, RunState.RUNNING.value, RunState.SUSPENDED.value)
        raise StateError(device.name, what, device.state.value, legal)
    if device.undrained:
        why = "it was stopped with requests in flight, which would never be answered"
        raise VdpaBridgeError(what, device=device.name, why=why, hint="resume it, and let it drain")
    require_accepted(what, device, unsavable(device), accept, "the device cannot give it")
    if device.state is not RunState.CONFIGURED:
        needed = [Capability.SUSPEND] if device.state is RunState.RUNNING else []
        if resumes and Capability.DEVICE_STATE in device.capabilities:
            # without RESUME, undoing takes a reset and replay: the device would have to give and take its state then
            needed.append(Capability.RESUME)
        for capability in needed:
            if capability not in device.capabilities:
                raise MissingCapability(device.name, what, capability.value, ALTERNATIVES[capability])


def start_from(device: Device, snapshot: DeviceSnapshot, transaction: Transaction) -> None:
    """Start ``device``, which stands where ``snapshot`` was taken."""
    with transaction.report.step("start"):
        transaction.expect_start(snapshot)
        device.start()


def suspend(device: Device, transaction: Transaction) -> DeviceSnapshot:
    """Suspend ``device`` if it runs; returns where it stands."""
    if device.state is RunState.RUNNING:
        with transaction.report.step("suspend"), transaction.report.watching(device):
            transaction.suspending = True
            device.suspend()
    with transaction.report.step("capture"):
        return capture(device)
