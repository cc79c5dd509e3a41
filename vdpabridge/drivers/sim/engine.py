"""The thread that processes rings. Whatever else touches them is done by this thread too, between two requests."""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from .guest_view import BadAddress
from .model import Died, Faults, Model
from .ring import Chain, DeviceRing, RingBroken, notify

__all__ = ["Engine", "Worker"]

Value = TypeVar("Value")
#: Requests of one queue before the others have their turn.
_BATCH = 64


@dataclass(slots=True)
class Worker:
    """A ring at work. Its eventfds are borrowed."""

    ring: DeviceRing
    kick: int | None = None
    call: int | None = None
    err: int | None = None
    enabled: bool = True
    stopping: bool = False
    look: bool = True
    """A kick came, or may have come."""
    broken: str = ""
    idle: threading.Event = field(default_factory=threading.Event)
    """Set when it is stopping and nothing is in flight any more."""


class Engine:
    """Runs ``model`` on rings. ``failed`` says what the device died of, where it did."""

    def __init__(self, model: Model, faults: Faults) -> None:
        self._model = model
        self._faults = faults
        self.workers: dict[int, Worker] = {}
        self.failed = ""
        self._answered = 0
        self._due: list[tuple[float, int, int, Chain]] = []
        self._order = 0
        self._commands: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ending = False

    def start(self) -> None:
        """Begin to process what is in `workers`."""
        self._ending = False
        self._thread = threading.Thread(target=self._loop, name="vdpabridge-sim", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. What is in flight stays so. Idempotent."""
        if self._thread is not None:
            self._ending = True
            notify(self._wake)
            self._thread.join()
            self._thread = None

    def call(self, function: Callable[[], Value]) -> Value:
        """Run ``function`` where no ring is being processed, and return its result or raise what it raised."""
        if self._thread is None or threading.current_thread() is self._thread:
            return function()
        done = threading.Event()
        results: list[Value] = []
        errors: list[BaseException] = []

        def command() -> None:
            try:
                results.append(function())
            except BaseException as error:  # noqa: BLE001  # it goes to the caller's thread
                errors.append(error)
            done.set()

        with self._lock:
            self._commands.append(command)
        notify(self._wake)
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    def stop_ring(self, worker: Worker, index: int, *, drain: bool, timeout_s: float | None) -> int:
        """Take ``worker`` of queue ``index`` out, and return where it stands. Raises TimeoutError, and it goes on."""

        def quieten() -> None:
            worker.stopping = True
            self._check_idle(worker)

        self.call(quieten)
        if drain and not self.failed and not worker.idle.wait(timeout_s):
            self.call(lambda: self._go_on(worker))
            raise TimeoutError
        self.call(lambda: self._remove(index))
        return worker.ring.avail_index

    def fileno(self) -> int:
        """What wakes the thread; borrowed."""
        return self._wake

    def wake(self) -> None:
        """Have the thread look at `workers` anew."""
        notify(self._wake)

    def close_rings(self) -> None:
        """End the thread and forget the rings, what is in flight and what the device died of."""
        self.stop()
        self._due.clear()
        self.workers.clear()
        self.failed = ""

    def close(self) -> None:
        """End everything. Idempotent."""
        self.close_rings()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    # --- in the thread ---

    def _loop(self) -> None:
        while not self._ending:
            with self._lock:
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            try:
                if not self.failed:
                    self._work()
                self._wait()
            except Exception as error:  # noqa: BLE001  # a mistake of ours is the device's death, not a hang
                self._die(str(error) if isinstance(error, Died) else f"{type(error).__name__}: {error}")
        for command in self._commands:
            command()
        self._commands = []

    def _die(self, why: str) -> None:
        self.failed = why
        for worker in self.workers.values():
            worker.idle.set()

    def _work(self) -> None:
        for index, worker in list(self.workers.items()):
            try:
                self._take(index, worker)
            except (RingBroken, BadAddress) as error:
                self._break(worker, str(error))
        while self._due and self._due[0][0] <= time.monotonic():
            _, _, index, chain = heapq.heappop(self._due)
            self._answer(index, chain)

    def _take(self, index: int, worker: Worker) -> None:
        if not worker.look or not worker.enabled or worker.stopping or worker.broken:
            return
        for _ in range(_BATCH):
            chain = worker.ring.take()
            if chain is None:
                worker.look = False
                return
            if self._faults.latency_s:
                self._order += 1
                heapq.heappush(self._due, (time.monotonic() + self._faults.latency_s, self._order, index, chain))
            else:
                self._answer(index, chain)

    def _answer(self, index: int, chain: Chain) -> None:
        worker = self.workers[index]
        if self._answered == self._faults.die_after_requests:
            raise Died(f"it has answered {self._answered} requests")
        try:
            self._model.handle(index, chain, fail=self._faults.fail_requests)
            worker.ring.use(chain)
        except (RingBroken, BadAddress) as error:
            self._break(worker, str(error))
            return
        self._answered += 1
        notify(worker.call)
        self._check_idle(worker)

    def _break(self, worker: Worker, why: str) -> None:
        """The driver broke the rules: the queue stops, and whoever listens for errors hears of it."""
        worker.broken = why
        worker.idle.set()
        notify(worker.err)

    def _check_idle(self, worker: Worker) -> None:
        if worker.stopping and not worker.ring.taken:
            worker.idle.set()

    def _go_on(self, worker: Worker) -> None:
        worker.stopping = False
        worker.idle.clear()
        worker.look = True

    def _remove(self, index: int) -> None:
        del self.workers[index]
        self._due = [each for each in self._due if each[2] != index]
        heapq.heapify(self._due)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        kicks: dict[int, Worker] = {}
        if not self.failed:
            for worker in self.workers.values():
                if worker.kick is not None:
                    poll.register(worker.kick, select.POLLIN)
                    kicks[worker.kick] = worker
        timeout_s = self._patience_s()
        for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000):
            _clear(fd)
            if fd in kicks:
                kicks[fd].look = True

    def _patience_s(self) -> float | None:
        """How long there is nothing to do without being woken."""
        if self.failed:
            return None
        for worker in self.workers.values():
            if worker.look and worker.enabled and not worker.stopping and not worker.broken:
                return 0.0
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None


def _clear(eventfd: int) -> None:
    """Read ``eventfd`` without waiting, whatever its own mode is: somebody else may have read it meanwhile."""
    with contextlib.suppress(BlockingIOError):
        os.preadv(eventfd, [bytearray(8)], -1, os.RWF_NOWAIT)
