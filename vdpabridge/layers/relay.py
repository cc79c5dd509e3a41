"""Between a guest and a device that sees shadow rings: copies what is available, marks what was used and copies it."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..device import DirtyLog, MemoryRegion, Operation
from ..errors import DeadlineExceeded
from ..linux.deadline import StillRunning, TimeLimit
from ..linux.eventfds import clear, signal, wake
from ..linux.step_thread import StepThread
from ..rings.descriptors import RingBroken
from ..rings.guest_view import GuestView
from ..state.snapshot import QueueEventfds
from .shadow_ring import RingUnmapped, ShadowRing

__all__ = ["Relay", "RelayedQueue"]

#: For the thread to end in: it ends after what it does now.
_GRACE_S = 1.0


class RelayedQueue:
    """A queue between its guest and its device. Owns the eventfds of both sides: the guest's as duplicates."""

    def __init__(self, ring: ShadowRing, eventfds: Mapping[Operation, int], *, enabled: bool) -> None:
        """``eventfds`` are the guest's; borrowed."""
        self.ring = ring
        self.enabled = enabled
        self.broken = ""
        """What the guest's driver did wrong. What it has made available before is still used."""
        self.to_device = _eventfd()
        self.from_device = _eventfd()
        self._guest = {operation: os.dup(eventfd) for operation, eventfd in eventfds.items()}

    @property
    def kick(self) -> int | None:
        """The guest's, if it has one."""
        return self._guest.get(Operation.SET_KICK)

    @property
    def wires(self) -> QueueEventfds:
        """What the device is to use; borrowed."""
        return QueueEventfds(self.to_device, self.from_device, self._guest.get(Operation.SET_ERR))

    def bind(self, operation: Operation, eventfd: int | None) -> None:
        """The guest uses ``eventfd`` (borrowed) from now on."""
        before = self._guest.pop(operation, None)
        if eventfd is not None:
            self._guest[operation] = os.dup(eventfd)
        if before is not None:
            os.close(before)

    def turn(self, *, forwards: bool) -> bool:
        """Copy what there is; whether there was anything. With ``forwards`` off, the device gets nothing new."""
        forwarded = published = False
        # without a kick eventfd, nobody asks the device to look
        if forwards and self.enabled and self.kick is not None and not self.broken:
            with self._patient():
                forwarded = self.ring.forward()
        if forwarded:
            wake(self.to_device)
        with self._patient():
            published = self.ring.publish()
        if published:
            signal(self._guest.get(Operation.SET_CALL))
        return forwarded or published

    @contextmanager
    def _patient(self) -> Iterator[None]:
        try:
            yield
        except RingUnmapped:
            pass  # as soon as it is there again
        except RingBroken as error:
            self.broken = str(error)
            signal(self._guest.get(Operation.SET_ERR))

    def finish(self) -> None:
        """Relay what the device has used before it was stopped."""
        while self.turn(forwards=False):
            pass
        if self.ring.unpublished:
            self.ring.incomplete = "the ring is not mapped, and the device has used more of it"

    def call_guest(self) -> None:
        """Have the guest look."""
        signal(self._guest.get(Operation.SET_CALL))

    def close(self) -> None:
        """Close the eventfds. Idempotent."""
        while self._guest:
            os.close(self._guest.popitem()[1])
        for fd in (self.to_device, self.from_device):
            if fd >= 0:
                os.close(fd)
        self.to_device = self.from_device = -1


class Relay:
    """Relays ``queues`` in ``guest``'s memory, in a thread of its own, from `start` on. Owns both.

    ``limit`` bounds every wait for the thread, which raises `DeadlineExceeded`. `failed` says what went wrong, if
    something did: then it relays nothing any more.
    """

    def __init__(self, name: str, guest: GuestView, queues: Mapping[int, RelayedQueue], limit: TimeLimit) -> None:
        self._name = name
        self._guest = guest
        self.queues = queues
        self._limit = limit
        self._forwards = True
        self._poll: select.poll | None = None
        self.failed = ""
        self._thread = StepThread("vdpabridge-relay", self._step, self._crash)

    @property
    def incomplete(self) -> str:
        """Why the log may lack a page that the device has written, if so."""
        return next((queue.ring.incomplete for queue in self.queues.values() if queue.ring.incomplete), self.failed)

    @property
    def wires(self) -> dict[int, QueueEventfds]:
        """What the device is to use for each queue; borrowed."""
        return {index: queue.wires for index, queue in self.queues.items()}

    def start(self) -> None:
        """Begin. Raises OSError if there cannot be another thread."""
        self._thread.start()

    def set_log(self, log: DirtyLog | None) -> None:
        """Mark in ``log`` from now on. On return, nobody writes into the one before."""
        self._between_steps(lambda: self._guest.set_log(log))

    def map(self, regions: Sequence[MemoryRegion]) -> None:
        """The guest has ``regions`` too; raises as `GuestView.map`."""
        self._between_steps(lambda: self._guest.map(regions))

    def unmap(self, regions: Sequence[MemoryRegion]) -> None:
        """The guest does not have ``regions`` any more."""
        self._between_steps(lambda: self._guest.unmap(regions))

    def bind(self, index: int, operation: Operation, eventfd: int | None) -> None:
        """The guest of queue ``index`` uses ``eventfd`` (borrowed) from now on."""

        def bind() -> None:
            self._poll = None
            self.queues[index].bind(operation, eventfd)

        self._between_steps(bind)

    def enable(self, index: int, enabled: bool) -> None:
        """Whether queue ``index`` is processed."""
        self._between_steps(lambda: setattr(self.queues[index], "enabled", enabled))

    @contextmanager
    def holding(self) -> Iterator[None]:
        """The device gets nothing new in the body, and after it until `go_on`, unless the body raises."""
        self._between_steps(lambda: self._forward(on=False))
        try:
            yield
        except BaseException:
            self.go_on()
            raise

    def finish(self) -> None:
        """Relay what the device has used before it was stopped. `failed` says if that was not possible."""

        def last() -> None:
            try:
                for queue in self.queues.values():
                    queue.finish()
            except (ValueError, OSError) as error:
                self._crash(error)

        self._between_steps(last)

    def go_on(self) -> None:
        """The device may get something new again."""
        self._thread.leave(lambda: self._forward(on=True))

    def call_guests(self) -> None:
        """Have every guest look: the device may have called nobody when it was stopped."""
        for queue in self.queues.values():
            queue.call_guest()

    def close(self) -> None:
        """End it, after the device has stopped. Idempotent. If it does not end, it can be closed once more."""
        try:
            # what had little time left is not kept waiting for longer than that
            left_s = self._limit.left_s()
            self._thread.stop(None if left_s is None else max(left_s, _GRACE_S))
        except StillRunning:
            raise self._late() from None
        self._thread.close()
        for queue in self.queues.values():
            queue.close()
        self._guest.close()

    def _between_steps(self, function: Callable[[], object]) -> None:
        try:
            self._thread.call(function, self._limit.left_s())
        except StillRunning:
            raise self._late() from None

    def _late(self) -> DeadlineExceeded:
        timeout_s = self._limit.deadline().timeout_s or 0
        why = "the relay of its rings does not come to an end of what it does"
        return DeadlineExceeded("relay", timeout_s, device=self._name, why=why, hint="reset it")

    # --- in the thread ---

    def _forward(self, *, on: bool) -> None:
        self._forwards = on
        self._poll = None

    def _step(self) -> None:
        busy = False
        if not self.failed:
            for queue in self.queues.values():
                busy = queue.turn(forwards=self._forwards) or busy
        # whoever was busy looks again before it sleeps: it has just asked to be kicked and called
        self._wait(0 if busy else None)

    def _wait(self, timeout_ms: int | None) -> None:
        if self._poll is None:
            self._poll = self._make_poll()
        for fd, _ in self._poll.poll(timeout_ms):
            clear(fd)

    def _make_poll(self) -> select.poll:
        poll = select.poll()
        poll.register(self._thread.wake_fd, select.POLLIN)
        if not self.failed:
            for queue in self.queues.values():
                poll.register(queue.from_device, select.POLLIN)
                if queue.kick is not None and self._forwards:
                    poll.register(queue.kick, select.POLLIN)
        return poll

    def _crash(self, error: Exception) -> None:
        self.failed = f"the relay of its rings has failed: {error}"
        self._poll = None


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
