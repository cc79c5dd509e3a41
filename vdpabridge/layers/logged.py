"""Keeps a dirty log for a device that cannot keep one itself, so that its guest can be migrated live.

As long as nobody wants a log, the device works on the guest's own rings. When a log is set, the device is suspended for
a moment and continues on shadow rings (`shadow_ring`), between which and the guest's a relay works and marks; when the
log ends, it goes back. While the device is suspended, its positions are those of the guest's rings either way.

If the device cannot be given shadow rings, it works on, and all memory that it can write is marked when it is
suspended: that is right too, and costs the time to send this memory once more. A log is never refused: a VMM may not
survive that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from dataclasses import replace

from ..abi.virtio import (
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET,
)
from ..abi.vring_base import SplitBase
from ..device import Capability, Device, DirtyLog, MemoryRegion, Operation, RunState
from ..errors import DeadlineExceeded, DeviceFailed, KernelError, VdpaBridgeError
from ..linux.descriptors import Kind, kind_of
from ..linux.eventfds import signal
from ..linux.mappings import check_inside
from ..linux.signals import uninterrupted
from ..rings.guest_view import DirtyBitmap
from ..state.losses import unsavable
from ..state.replay import resume
from ..state.snapshot import DeviceSnapshot, QueueEventfds, QueueSnapshot, capture
from .layer import Layer
from .relay import Relay
from .ring_change import Rings, change_rings, place_rings
from .shadows import NOT_SHADOWED, Shadows, of_the_rings

__all__ = ["Logged", "loggable"]

#: What changes a queue behind the relay's back, or needs rings that it cannot relay.
_LEFT_OUT = {
    Capability.SETUP_WHILE_SUSPENDED,
    Capability.QUEUE_CONTROL,
    Capability.SKIP_DRAIN,
    Capability.INFLIGHT,
}
_NOT_RELAYED = (VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_RING_RESET)


def loggable(device: Device) -> Device:
    """``device``, which is taken, or a layer over it that keeps a dirty log; the caller closes what is returned.

    A device that keeps a log itself stays as it is, and one that could not be migrated with a log either: it cannot be
    suspended, or has state that it does not give.
    """
    capabilities = device.capabilities
    if Capability.DIRTY_LOG in capabilities or Capability.SUSPEND not in capabilities or unsavable(device):
        return device
    return Logged(device)


class Logged(Layer):
    """``below``, with a dirty log."""

    def __init__(self, below: Device) -> None:
        """Take ownership of ``below``."""
        super().__init__(below)
        self._shadows = Shadows(self, below)
        self._relay: Relay | None = None
        """While the device has shadow rings: also while it is suspended."""
        self._kept: tuple[int, ...] | None = None
        """Which log the relay marks in."""
        self.marks_all = ""
        """Why all memory is marked when the device is suspended, if so."""

    @property
    def capabilities(self) -> Set[Capability]:
        return self.below.capabilities - _LEFT_OUT | {Capability.DIRTY_LOG}

    @property
    def offered_features(self) -> int:
        """Without what cannot be relayed."""
        return self.below.offered_features & ~sum(1 << bit for bit in _NOT_RELAYED)

    # --- the log ---

    def _set_dirty_log(self, log: DirtyLog | None) -> None:
        if log is not None:
            check_inside(log.fd, log.size_bytes, log.offset)
        # whoever interrupts this would leave a device that stands still
        with uninterrupted():
            if self._relay is not None:
                self._relay.set_log(log)
                self._kept = _file_of(log)
            relayed = self._relay is not None
            if self.state is RunState.RUNNING and (relayed if log is None else not relayed and not self.marks_all):
                self._pause_for(log)
            elif log is None:
                self.marks_all = ""

    def _pause_for(self, log: DirtyLog | None) -> None:
        """Stop the running device, and have it continue on the rings that ``log`` needs. It runs afterwards, or has
        failed."""
        try:
            self._stop(again=True)
            self._go_on(log)
        except DeviceFailed:
            raise
        except (VdpaBridgeError, OSError, ValueError) as error:
            if self.below.state is not RunState.RUNNING or not getattr(error, "nothing_done", False):
                raise self._broken_off(error) from error
            # its guest gives it no pause, and will be stopped before the device is. On shadow rings it works as well
            self.marks_all = str(error) if log is not None else ""
        except BaseException as error:
            if self.below.state is not RunState.RUNNING:
                self._broken_off(error)
            raise

    def _start(self) -> None:
        log, self.marks_all = self.dirty_log, ""
        own = Rings(self._as_configured(), self._guest_wires())
        if self._relay is not None:
            # an earlier start has failed
            self._end_relay()
            place_rings(self.below, own)
        if log is not None and (shadows := self._make_relay(own, log)) is not None:
            if self._starts(shadows):
                return
            self._end_relay()
            place_rings(self.below, own)
        super()._start()

    def _starts(self, shadows: Rings) -> bool:
        """Whether the configured device starts on ``shadows``; if not, `marks_all` says why."""
        assert self._relay is not None
        try:
            self._relay.start()
            place_rings(self.below, shadows)
            super()._start()
        except (VdpaBridgeError, OSError, ValueError) as error:
            if self.below.state is not RunState.CONFIGURED:
                raise
            self.marks_all = str(error)
            return False
        return True

    def _as_configured(self) -> DeviceSnapshot:
        queues = {
            index: QueueSnapshot(record.setup, record.base or SplitBase(0), record.enabled)
            for index, record in sorted(self.queues.items())
            if record.setup is not None
        }
        return DeviceSnapshot(self.identity.device_id, self.accepted_features, queues, b"")

    def _suspend(self, *, drain: bool) -> None:
        del drain  # a device that leaves requests in flight is not relayed: `_LEFT_OUT`
        self._stop()
        self._mark_all()

    def _resume(self) -> None:
        with uninterrupted():
            self._go_on(self.dirty_log)

    def _stop(self, *, again: bool = False) -> None:
        """Suspend the device; the guest and the log then know everything that it has done. ``again``: if it fails, try
        once more, to know whether the device is suspended."""
        with self._failing_together():
            if self._relay is None:
                self._suspend_below(again=again)
                return
            with self._relay.holding():
                self._suspend_below(again=again)
        try:
            self._relay.finish()
        except DeadlineExceeded as error:
            raise self._fail(str(error)) from error
        if self._relay.failed:
            self._mark_all()
            raise self._fail(self._relay.failed)

    def _suspend_below(self, *, again: bool) -> None:
        try:
            self.below.suspend()
        except KernelError as error:
            if not again or error.nothing_done or self.below.state is not RunState.RUNNING:
                raise
            self.below.suspend()

    def _mark_all(self) -> None:
        if self.dirty_log is None:
            return
        if self._relay is None or self._kept != _file_of(self.dirty_log):
            # somebody was interrupted who was about to change it
            self.marks_all = self.marks_all or "another log was kept"
        elif self._relay.incomplete:
            self.marks_all = self._relay.incomplete
        if not self.marks_all:
            return
        try:
            bitmap = DirtyBitmap(self.dirty_log)
            try:
                bitmap.mark_all(self.regions)
            finally:
                bitmap.close()
        except OSError as error:
            raise self._fail(f"its dirty log does not take what is not in it: {error}") from error

    def _go_on(self, log: DirtyLog | None) -> None:
        """Have the suspended device continue, on the rings that ``log`` needs."""
        with self._failing_together():
            if log is None:
                self.marks_all = ""
            if (log is None) == (self._relay is None) or self.marks_all:
                self._go_on_as_before()
            elif log is None:
                self._leave_shadows()
            else:
                self._enter_shadows(log)

    def _go_on_as_before(self) -> None:
        resume(self.below)
        if self._relay is not None:
            self._relay.go_on()

    # --- from one kind of rings to the other ---

    def _enter_shadows(self, log: DirtyLog) -> None:
        try:
            own = Rings(capture(self.below), self._guest_wires())
        except (VdpaBridgeError, OSError) as error:
            self.marks_all = str(error)
            self._go_on_as_before()
            return
        shadows = self._make_relay(own, log)
        relay = self._relay
        if shadows is None or relay is None:
            self._go_on_as_before()
            return
        try:
            relay.start()
            self.marks_all = change_rings(self.below, shadows, own)
        except (VdpaBridgeError, OSError) as error:
            if self.below.state is not RunState.SUSPENDED:
                raise
            # no thread for the relay, no descriptors for what a reset needs
            self.marks_all = str(error)
            self._end_relay()
            self._go_on_as_before()
            return
        relay.call_guests()
        if self.marks_all:
            self._without_relay()

    def _leave_shadows(self) -> None:
        relay = self._relay
        assert relay is not None
        try:
            snapshot = capture(self.below)
        except (VdpaBridgeError, OSError):
            # it works on them as well, without a log
            self._go_on_as_before()
            return
        queues = {
            index: replace(queue, setup=self.queues[index].setup or queue.setup)
            for index, queue in snapshot.queues.items()
        }
        own = Rings(replace(snapshot, queues=queues), self._guest_wires())
        try:
            refused = change_rings(self.below, own, Rings(snapshot, relay.wires))
        except (VdpaBridgeError, OSError):
            if self.below.state is not RunState.SUSPENDED:
                raise
            self._go_on_as_before()
            return
        if refused:
            relay.go_on()
            return
        relay.call_guests()
        self._without_relay()
        try:
            self._shadows.drop()
        except VdpaBridgeError:
            # it is still mapped, for the next log
            return

    def _without_relay(self) -> None:
        """The device works on the guest's rings."""
        self._end_relay()
        for wires in self._guest_wires().values():
            # the guest may have kicked the relay
            signal(wires.kick)

    def _broken_off(self, error: BaseException) -> DeviceFailed:
        """It was suspended for the log, and perhaps does not run now: only a reset tells what it does."""
        return self._fail(f"it did not continue after a change of its dirty log: {str(error) or type(error).__name__}")

    def _guest_wires(self) -> dict[int, QueueEventfds]:
        return {
            index: QueueEventfds(*map(record.eventfds.get, (Operation.SET_KICK, Operation.SET_CALL, Operation.SET_ERR)))
            for index, record in self.queues.items()
        }

    def _make_relay(self, own: Rings, log: DirtyLog) -> Rings | None:
        """The shadow rings for the stopped device, and `_relay`; None, and `marks_all`, if there cannot be any."""
        try:
            self._relay, shadows = self._shadows.make(own.snapshot, log)
        except NOT_SHADOWED as error:
            self.marks_all = str(error)
            return None
        self._kept = _file_of(log)
        return shadows

    # --- what the relay has to know ---

    def _map(self, regions: Sequence[MemoryRegion]) -> None:
        super()._map(regions)
        if self._relay is not None:
            try:
                self._relay.map(of_the_rings(regions))
            except BaseException:
                super()._unmap(regions)
                raise

    def _unmap(self, regions: Sequence[MemoryRegion]) -> None:
        super()._unmap(regions)
        if self._relay is not None:
            self._relay.unmap(of_the_rings(regions))

    def _bind_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None:
        relayed = self._relay is not None and index in self._relay.queues
        if relayed and eventfd is not None and kind_of(eventfd) is not Kind.EVENTFD:
            raise ValueError(f"{self.name}: {operation.value} ({index}): descriptor {eventfd} is not an eventfd")
        if not relayed or operation is Operation.SET_ERR:
            super()._bind_eventfd(operation, index, eventfd)
        if relayed and self._relay is not None:
            self._relay.bind(index, operation, eventfd)

    def _enable_queue(self, index: int, enabled: bool) -> None:
        super()._enable_queue(index, enabled)
        if self._relay is not None and index in self._relay.queues:
            self._relay.enable(index, enabled)

    def _check_health(self) -> None:
        if self._relay is not None and self._relay.failed:
            raise self._fail(self._relay.failed)
        super()._check_health()

    # --- its end ---

    def _reset(self) -> None:
        super()._reset()
        self.marks_all = ""
        self._end_relay()
        self._shadows.drop()

    def _close(self) -> None:
        try:
            super()._close()
        finally:
            self._end_relay()
            self._shadows.drop()

    def _give_up(self) -> bool:
        certain = super()._give_up()
        try:
            self._end_relay()
        except DeadlineExceeded:
            return False
        self._shadows.drop()
        return certain

    def _end_relay(self) -> None:
        """The device has stopped. If the relay does not end in time, it is still there, and so is what it works on."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None


def _file_of(log: DirtyLog | None) -> tuple[int, ...] | None:
    """What ``log`` is a part of: its descriptor has duplicates."""
    if log is None:
        return None
    facts = os.fstat(log.fd)
    return facts.st_dev, facts.st_ino, log.offset, log.size_bytes
