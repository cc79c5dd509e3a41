"""Resuming after a suspend, on devices that can resume and on those that cannot.

A device without RESUME (every kernel before 6.3, and most hardware) leaves the suspended state only by a reset. Set up
again with its queue positions, and with its own state if it can give that, it continues as if it had resumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TypeVar

from ..device import Capability, Device, DirtyLog, InflightRegion, RunState
from ..errors import StateError, VdpaBridgeError
from ..linux.deadline import Deadline
from ..linux.signals import uninterrupted
from .losses import Loss, require_accepted, resumes_by_itself, unsavable
from .report import Report
from .snapshot import DeviceSnapshot, QueueEventfds, capture, eventfds_of, restore
from .transfer.carry import keep_state, write_state
from .transfer.channel import Limits

__all__ = ["ReplayFailed", "replay", "resume", "start_over"]

Shared = TypeVar("Shared", DirtyLog, InflightRegion)


class ReplayFailed(VdpaBridgeError):
    """The device was reset and could not be set up again. ``snapshot`` has its queue positions.

    `Device.state` says whether it has started all the same: RUNNING unless it is certain that it has not.
    """

    def __init__(self, device: str, why: str, snapshot: DeviceSnapshot) -> None:
        super().__init__("resume by reset and replay", device=device, why=why)
        self.snapshot = snapshot


def resume(device: Device, *, accept: Set[Loss] = frozenset()) -> Capability | None:
    """Resume after `Device.suspend`, by RESUME if the device has it, otherwise by `replay`; raises as they do.

    Returns Capability.RESUME, or None if the device was reset and set up again.
    """
    if resumes_by_itself(device):
        device.resume()
        return Capability.RESUME
    replay(device, accept=accept)
    return None


def replay(device: Device, *, accept: Set[Loss] = frozenset()) -> None:
    """Reset a suspended device, set it up as it was, with the queue positions it had, and start it.

    `start_over` says what else is kept. Raises, before anything is done, `StateError` if the device is not suspended
    and `StateWouldBeLost` if it has state that cannot be kept and that ``accept`` does not name; `ReplayFailed` from
    the reset on.
    """
    if device.state is not RunState.SUSPENDED:
        raise StateError(device.name, "resume", device.state.value, (RunState.SUSPENDED.value,))
    require_accepted(
        "resume by reset and replay", device, unsavable(device), accept, "a device without RESUME is reset to continue"
    )
    snapshot = capture(device)
    with ExitStack() as stack:

        def keep(eventfd: int | None) -> int | None:
            """A duplicate: the reset closes the device's own."""
            return _keep(stack, None if eventfd is None else os.dup(eventfd))

        eventfds = {
            index: QueueEventfds(keep(wires.kick), keep(wires.call), keep(wires.err))
            for index, wires in eventfds_of(device).items()
        }

        try:
            start_over(
                device,
                lambda: restore(device, snapshot, eventfds),
                lambda error: ReplayFailed(device.name, str(error), snapshot),
            )
        except BaseException as interruption:
            if not isinstance(interruption, Exception):
                # also one that came when signals were no longer held back
                interruption.__dict__["snapshot"] = snapshot
            raise


def start_over(
    device: Device,
    set_up: Callable[[], None],
    failed: Callable[[Exception], VdpaBridgeError] | None = None,
    *,
    start: bool = True,
    keep: bool = True,
) -> None:
    """Reset a stopped device, let ``set_up`` accept features and place the queues again, and ``start`` it.

    A device that can give its own state (DEVICE_STATE) gives it before the reset and gets it back after. If it does not
    give it, nothing is done; if it does not take it back, it has failed. With ``keep``, the eventfd for
    configuration changes, the dirty log and the in-flight region stay.

    ``failed`` turns an error from the reset on into another error. The device then is reset, has failed or runs: its
    `Device.state` says which.
    """
    limits = Limits(Deadline(device.timeout_s))
    with ExitStack() as stack, device.limit.within(limits.deadline):
        spool = _keep(stack, keep_state(device, limits) if _has_state(device) else None)
        config_call = _keep(stack, os.dup(device.config_call) if keep and device.config_call is not None else None)
        log = _kept(stack, device.dirty_log if keep else None)
        inflight = _kept(stack, device.inflight if keep else None)
        # an interruption here would leave a device that is reset, and lose what it had
        with _uncut(failed):
            before = device.state_version
            keeps_its_state = spool is not None or not unsavable(device)
            device.reset()
            if spool is not None:
                _give_back(device, spool, limits)
            if keeps_its_state:
                # it has it again, or has none
                device.state_version = before
            if inflight is not None:
                device.set_inflight(inflight)
            set_up()
            if log is not None:
                device.set_dirty_log(log)
            if config_call is not None:
                device.set_config_call(config_call)
            if start:
                device.start()


@contextmanager
def _uncut(failed: Callable[[Exception], VdpaBridgeError] | None) -> Iterator[None]:
    """Signals wait for the end of the body, whose errors ``failed`` turns into others. If a signal then raises, its
    exception gets the snapshot of that error: nothing else has it any more."""
    lost: VdpaBridgeError | None = None
    try:
        with uninterrupted():
            try:
                yield
            except (VdpaBridgeError, OSError) as error:
                if failed is None:
                    raise
                lost = failed(error)
                raise lost from error
    except BaseException as interruption:
        if isinstance(lost, ReplayFailed) and interruption is not lost:
            interruption.add_note(str(lost))
            interruption.__dict__["snapshot"] = lost.snapshot
        raise


def _give_back(device: Device, spool: int, limits: Limits) -> None:
    try:
        write_state(device, spool, limits, Report())
        device.check_state()
    except BaseException as error:
        # it may have another state now, and would continue with that
        failed = device.condemn(f"its own state could not be given back: {str(error) or type(error).__name__}")
        if isinstance(error, (VdpaBridgeError, OSError)):
            raise failed from error
        raise


def _has_state(device: Device) -> bool:
    return Capability.DEVICE_STATE in device.capabilities


def _kept(stack: ExitStack, shared: Shared | None) -> Shared | None:
    """``shared`` with a descriptor of its own, which is closed with ``stack``: the reset closes the device's."""
    if shared is None:
        return None
    fd = os.dup(shared.fd)
    stack.callback(os.close, fd)
    return replace(shared, fd=fd)


def _keep(stack: ExitStack, fd: int | None) -> int | None:
    """``fd``, which is closed with ``stack``."""
    if fd is not None:
        stack.callback(os.close, fd)
    return fd
