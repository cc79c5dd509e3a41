"""Processes rings in a thread. Everything else that touches them runs in that thread too, between two requests."""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...linux.deadline import TimeLimit
from ...linux.eventfds import clear, signal
from ...linux.step_thread import StepThread
from ...rings.descriptors import RingBroken
from ...rings.guest_view import BadAddress
from .model import Died, Faults, Model
from .ring import Chain
from .worker import Stopping, Worker

__all__ = ["Engine"]

Value = TypeVar("Value")
#: Requests of one queue before the others have their turn.
_BATCH = 64


class Engine:
    """Runs ``model`` on rings. `failed` says what the device died of, if it did.

    ``limit`` bounds every wait for the thread: a wait that would last longer raises `StillRunning`.
    """

    def __init__(self, model: Model, faults: Faults, limit: TimeLimit) -> None:
        self._model = model
        self._faults = faults
        self._limit = limit
        self.workers: dict[int, Worker] = {}
        self.failed = ""
        self._answered = 0
        self._due: list[tuple[float, int, int, Chain]] = []
        self._order = 0
        self._thread = StepThread("vdpabridge-sim", self._step, self._die)

    def start(self) -> None:
        """Begin to process what is in `workers`."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Requests in flight stay in flight. Idempotent."""
        self._thread.stop(self._limit.left_s())

    def call(self, function: Callable[[], Value]) -> Value:
        """Run ``function`` while no ring is being processed, and return its result or raise what it raised."""
        return self._thread.call(function, self._limit.left_s())

    def stop_rings(self, indices: Sequence[int], note: Callable[[int, int], None], *, drain: bool) -> None:
        """Remove the workers of queues ``indices``; before anything else, call ``note`` with where each stands.

        If they are not quiet in time, or the wait is interrupted, all of them continue. Raises TimeoutError.
        """
        workers = {index: self.workers[index] for index in indices}

        def all_of_them(how: Stopping) -> None:
            for worker in workers.values():
                worker.stop(how)

        # if anything fails or interrupts this, the rings continue, because nobody waits for them any more
        try:
            self.call(lambda: all_of_them(Stopping.DRAIN if drain else Stopping.NOW))
            for worker in workers.values():
                if not self.failed and not worker.idle.wait(self._limit.left_s()):
                    raise TimeoutError
            self.call(lambda: self._remove(indices, note))
        except BaseException:
            self._thread.leave(lambda: all_of_them(Stopping.NO))
            raise

    @property
    def at_work(self) -> bool:
        """Whether the thread may process rings."""
        return self._thread.running and not self.failed

    def fileno(self) -> int:
        """The descriptor that wakes the thread; borrowed."""
        return self._thread.wake_fd

    def close_rings(self) -> None:
        """End the thread and forget the rings, what is in flight and what the device died of."""
        self.stop()
        self._due.clear()
        self.workers.clear()
        self.failed = ""
        self._answered = 0

    def close(self) -> None:
        """End everything. Idempotent."""
        self.close_rings()
        self._thread.close()

    # --- in the thread ---

    def _step(self) -> None:
        if not self.failed:
            for index, worker in list(self.workers.items()):
                self._take(index, worker)
            while self._due and self._due[0][0] <= time.monotonic() and not self._thread.wanted:
                _, _, index, chain = heapq.heappop(self._due)
                self._answer(index, chain)
        self._wait()

    def _take(self, index: int, worker: Worker) -> None:
        for _ in range(_BATCH):
            if not worker.ready or self._thread.wanted:
                return
            try:
                chain = worker.take()
            except RingBroken as error:
                self._break(worker, str(error))
                return
            if chain is None:
                return
            if self._faults.latency_s:
                self._order += 1
                heapq.heappush(self._due, (time.monotonic() + self._faults.latency_s, self._order, index, chain))
            else:
                self._answer(index, chain)

    def _answer(self, index: int, chain: Chain) -> None:
        worker = self.workers[index]
        try:
            self._model.handle(chain, fail=self._faults.fail_requests)
            worker.ring.use(chain)
        except (RingBroken, BadAddress) as error:
            worker.ring.taken.pop(chain.head, None)
            self._break(worker, str(error))
            return
        signal(worker.call)
        worker.check_idle()
        self._answered += 1
        if self._faults.die_after_requests is not None and self._answered >= self._faults.die_after_requests:
            raise Died(f"it has answered {self._answered} requests")

    def _break(self, worker: Worker, why: str) -> None:
        """The guest's driver broke the rules: take nothing more from the ring, and signal its error eventfd."""
        worker.broken = why
        worker.check_idle()
        signal(worker.err)

    def _die(self, error: Exception) -> None:
        self.failed = str(error) if isinstance(error, Died) else f"{type(error).__name__}: {error}"
        for worker in self.workers.values():
            worker.idle.set()

    def _remove(self, indices: Sequence[int], note: Callable[[int, int], None]) -> None:
        for index in indices:
            note(index, self.workers.pop(index).ring.avail_index)
        self._due = [each for each in self._due if each[2] in self.workers]
        heapq.heapify(self._due)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._thread.wake_fd, select.POLLIN)
        kicks: dict[int, Worker] = {}
        if not self.failed:
            for worker in self.workers.values():
                if worker.kick is not None:
                    poll.register(worker.kick, select.POLLIN)
                    kicks[worker.kick] = worker
        timeout_s = self._patience_s()
        for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000):
            clear(fd)
            if fd in kicks:
                kicks[fd].look = True

    def _patience_s(self) -> float | None:
        """How long the thread has nothing to do unless something wakes it; None for ever."""
        if self.failed:
            return None
        if any(worker.ready for worker in self.workers.values()):
            return 0.0
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
