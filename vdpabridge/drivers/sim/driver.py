"""`Sim`: a real virtio device inside this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Set
from typing import Self, TypeVar

from ...abi.inflight import queue_region_bytes
from ...abi.virtio import VIRTIO_F_VERSION_1
from ...abi.virtio_ring import VIRTIO_RING_F_INDIRECT_DESC
from ...device import (
    Capability,
    Device,
    DirtyLog,
    Identity,
    InflightRegion,
    MemoryRegion,
    Operation,
    QueueBase,
    QueueSetup,
    RunState,
    SplitBase,
    StateDirection,
    StatePhase,
)
from ...errors import DeadlineExceeded, FeatureError, VdpaBridgeError
from ...linux.deadline import StillRunning, TimeLimit
from ...linux.descriptors import Kind, kind_of
from ...linux.eventfds import signal
from ...linux.mappings import SharedMapping, check_inside, memory_file
from ...rings.descriptors import RingBroken
from ...rings.guest_view import GuestView
from .blk import BlockModel
from .engine import Engine
from .fs import FsModel
from .inflight import InflightTable
from .model import Died, Faults, Model, StateRefused
from .model_state import ModelState
from .ring import DeviceRing
from .tree import Directory
from .worker import Worker

__all__ = ["Sim"]

Value = TypeVar("Value")
QUEUE_SIZE_MAX = 1024
_EVERYTHING = frozenset(Capability)
_EVENTFDS = {Operation.SET_KICK: "kick", Operation.SET_CALL: "call", Operation.SET_ERR: "err"}


class Sim(Device):
    """A virtio device without hardware, kernel or another process: it processes rings in a thread of its own.

    It has every capability, and does exactly what `Device` promises; `faults` are the exceptions, for tests.
    """

    def __init__(self, model: Model, name: str, *, timeout_s: float | None = None) -> None:
        """Take ownership of ``model``."""
        self._faults = Faults()
        self._model = model
        limit = TimeLimit(timeout_s)
        self._engine = Engine(model, self._faults, limit)
        super().__init__(name, limit)
        self._guest = GuestView()
        self._eventfds: dict[tuple[int, Operation], int] = {}
        self._bases: dict[int, int] = {}
        self._inflight: tuple[SharedMapping, InflightRegion, int] | None = None
        self._state_transfer = ModelState(model, self._faults)

    @classmethod
    def blk(cls, size_bytes: int = 64 << 20, *, queue_count: int = 2, timeout_s: float | None = None) -> Self:
        """A disk in memory. Its content is part of its state."""
        return cls(BlockModel.in_memory(size_bytes, queue_count=queue_count), "sim:blk", timeout_s=timeout_s)

    @classmethod
    def blk_file(
        cls, path: str, *, read_only: bool = False, queue_count: int = 2, timeout_s: float | None = None
    ) -> Self:
        """A disk in file ``path``, whose content is not part of the state. Raises OSError as open(2) does."""
        model = BlockModel.of_file(path, read_only=read_only, queue_count=queue_count)
        return cls(model, f"sim:blk,file={path}", timeout_s=timeout_s)

    @classmethod
    def fs(cls, tree: Directory | None = None, *, tag: str = "", timeout_s: float | None = None) -> Self:
        """A file system of ``tree``, by default of a few files."""
        return cls(FsModel(tree, tag=tag), "sim:fs", timeout_s=timeout_s)

    # --- what it is ---

    @property
    def faults(self) -> Faults:
        """What a test wants to go wrong."""
        return self._faults

    @property
    def model(self) -> Model:
        """What the device does with requests."""
        return self._model

    @property
    def identity(self) -> Identity:
        model = self.model
        return Identity(model.device_id, model.queue_count, QUEUE_SIZE_MAX, len(model.config()))

    @property
    def capabilities(self) -> Set[Capability]:
        return _EVERYTHING

    @property
    def offered_features(self) -> int:
        return 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | self.model.features

    def fileno(self) -> int:
        """The eventfd that wakes the device's thread, borrowed; the device has no other descriptor."""
        return self._engine.fileno()

    # --- negotiation and configuration space ---

    def _accept_features(self, features: int) -> None:
        self._require_alive()
        if unknown := features & ~self.offered_features:
            raise FeatureError(self.name, f"bits {unknown:#x} are not offered", unknown)
        if not features >> VIRTIO_F_VERSION_1 & 1:
            raise FeatureError(self.name, "VERSION_1 is missing, and the device has no legacy mode", features)

    def _read_config(self, offset: int, size: int) -> bytes:
        return self.model.config()[offset : offset + size]

    def _write_config(self, offset: int, data: bytes) -> None:
        self._require_alive()
        if self._call(lambda: self.model.write_config(offset, data)):
            signal(self.config_call)

    def _set_config_call(self, eventfd: int | None) -> None:
        # the device signals its own record of it, a duplicate
        del eventfd

    # --- memory ---

    def _map(self, regions: Sequence[MemoryRegion]) -> None:
        self._call(lambda: self._guest.map(regions))

    def _unmap(self, regions: Sequence[MemoryRegion]) -> None:
        self._call(lambda: self._guest.unmap(regions))

    # --- queues ---

    def _set_queue(self, index: int, setup: QueueSetup) -> None:
        if setup.size & (setup.size - 1) or not 0 < setup.size <= QUEUE_SIZE_MAX:
            raise ValueError(f"{self.name}: queue {index} with {setup.size} descriptors, not a power of two up to 1024")
        for address, align in ((setup.desc_address, 16), (setup.avail_address, 2), (setup.used_address, 4)):
            if address % align:
                raise ValueError(f"{self.name}: queue {index}: {address:#x} is not a multiple of {align}")
        self._require_stopped(index, Operation.SET_QUEUE)

    def _set_base(self, index: int, base: QueueBase) -> None:
        if not isinstance(base, SplitBase):
            raise ValueError(f"{self.name}: queue {index}: the device has split rings only")
        self._require_stopped(index, Operation.SET_BASE)
        self._bases[index] = base.avail_index

    def _get_base(self, index: int) -> QueueBase:
        return SplitBase(self._bases.get(index, 0))

    def _bind_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None:
        if eventfd is not None and kind_of(eventfd) is not Kind.EVENTFD:
            raise ValueError(f"{self.name}: {operation.value} ({index}): descriptor {eventfd} is not an eventfd")
        duplicate = None if eventfd is None else os.dup(eventfd)
        old = self._eventfds.pop((index, operation), None)
        if duplicate is not None:
            self._eventfds[index, operation] = duplicate

        def replace() -> None:
            if (worker := self._engine.workers.get(index)) is not None:
                setattr(worker, _EVENTFDS[operation], self._eventfds.get((index, operation)))
                worker.look = True

        self._call(replace)
        if old is not None:
            os.close(old)

    def _enable_queue(self, index: int, enabled: bool) -> None:
        if self.state is not RunState.RUNNING:
            return
        self._require_alive()
        if enabled and index not in self._engine.workers:
            self._call(lambda: self._add_worker(index, enabled=True))
            return

        def switch() -> None:
            if (worker := self._engine.workers.get(index)) is not None:
                worker.enabled = enabled
                worker.look = True

        self._call(switch)

    def _stop_queue(self, index: int, *, drain: bool) -> QueueBase:
        self._require_alive()
        if index in self._engine.workers:
            self._stop_workers([index], drain=drain)
        self._require_alive()
        return self._get_base(index)

    # --- run control ---

    def _start(self) -> None:
        self._go()

    def _resume(self) -> None:
        self._go()

    def _suspend(self, *, drain: bool) -> None:
        if self.state is RunState.SUSPENDED:
            return
        self._require_alive()
        self._stop_workers(list(self._engine.workers), drain=drain)
        self._wait_for(self._engine.stop, "suspend")
        self._require_alive()

    def _reset(self) -> None:
        self._state_transfer.drop()
        self._wait_for(self._engine.close_rings, "reset")
        while self._eventfds:
            # out of the records first: a number that is closed twice could belong to another file by then
            os.close(self._eventfds.popitem()[1])
        self._bases.clear()
        self._guest.set_log(None)
        self._drop_inflight()
        self.model.reset()

    def _check_health(self) -> None:
        self._require_alive()

    def _is_idle(self) -> bool:
        return not self._engine.at_work

    def _close(self) -> None:
        self._reset()
        self._engine.close()
        self._guest.close()
        self.model.close()

    def _go(self) -> None:
        self._require_alive()
        self._state_transfer.drop()
        try:
            for index, record in self.queues.items():
                if record.setup is not None and record.enabled:
                    self._add_worker(index, enabled=True)
        except BaseException:
            self._engine.workers.clear()
            raise
        self._engine.start()

    def _add_worker(self, index: int, *, enabled: bool) -> None:
        """Have the engine process queue ``index``, if it was set up."""
        record = self.queues.get(index)
        if record is None or record.setup is None:
            return
        kick, call, err = (self._eventfds.get((index, operation)) for operation in _EVENTFDS)
        try:
            table = self._inflight_table(index, record.setup.size)
            ring = DeviceRing(self._guest, record.setup, self._bases.get(index, 0), table)
        except (RingBroken, ValueError) as error:
            raise VdpaBridgeError(f"start queue {index}", device=self.name, why=str(error)) from None
        self._engine.workers[index] = Worker(ring, kick, call, err, enabled=enabled)

    def _stop_workers(self, indices: list[int], *, drain: bool) -> None:
        """Stop these queues, all or none, and note where they stand."""
        untracked = [index for index in indices if not self._engine.workers[index].ring.tracked]
        if untracked and not drain:
            why = f"queue {untracked[0]} has no in-flight region: its requests would be lost"
            raise VdpaBridgeError("stop without draining", device=self.name, why=why, hint="call set_inflight() first")
        try:
            note = self._bases.__setitem__
            self._wait_for(lambda: self._engine.stop_rings(indices, note, drain=drain), "stop queues")
        except TimeoutError as error:
            if isinstance(error, DeadlineExceeded):
                raise
            why = "requests are still in flight"
            raise DeadlineExceeded("stop queues", self.timeout_s or 0, device=self.name, why=why) from None

    def _call(self, function: Callable[[], Value]) -> Value:
        """Have the device's thread run ``function``."""
        return self._wait_for(lambda: self._engine.call(function), "ask the device")

    def _wait_for(self, wait: Callable[[], Value], what: str) -> Value:
        try:
            return wait()
        except StillRunning:
            why = "its thread is busy with one request"
            raise DeadlineExceeded(what, self.timeout_s or 0, device=self.name, why=why) from None

    def _require_stopped(self, index: int, operation: Operation) -> None:
        if index in self._engine.workers:
            why, hint = "the queue is being processed", "stop it first"
            raise VdpaBridgeError(f"{operation.value} ({index})", device=self.name, why=why, hint=hint)

    def _require_alive(self) -> None:
        if self._engine.failed:
            raise self._fail(self._engine.failed)

    # --- device state ---

    def _set_state_fd(self, direction: StateDirection, phase: StatePhase, fd: int) -> int | None:
        try:
            self._require_alive()
        except BaseException:
            os.close(fd)
            raise
        try:
            self._state_transfer.begin(direction, phase, fd)
        except StateRefused as error:
            raise VdpaBridgeError(f"{direction.name.lower()} device state", device=self.name, why=error.why) from None
        return None

    def _check_state(self) -> None:
        self._require_alive()
        try:
            self._state_transfer.check(self.limit.left_s())
        except TimeoutError:
            why = "the other end has not closed its descriptor, or is slow"
            raise DeadlineExceeded("device state transfer", self.timeout_s or 0, device=self.name, why=why) from None
        except StateRefused as error:
            raise VdpaBridgeError("device state transfer", device=self.name, why=error.why) from None
        except Died as error:
            self._engine.failed = str(error)
            self._require_alive()

    def _abandon_state(self) -> None:
        self._state_transfer.drop()

    # --- dirty log and in-flight requests ---

    def _set_dirty_log(self, log: DirtyLog | None) -> None:
        self._call(lambda: self._guest.set_log(log))

    def _get_inflight(self, queue_count: int, queue_size: int) -> InflightRegion:
        if not 0 < queue_count <= self.model.queue_count or not 0 < queue_size <= QUEUE_SIZE_MAX:
            raise ValueError(f"{self.name}: an in-flight region for {queue_count} queues of {queue_size}")
        # room for the largest ring: QEMU 10.0 asks for a region for 128 descriptors, and then SeaBIOS makes a ring of
        # 256 and Linux one of 1024
        size = queue_count * queue_region_bytes(QUEUE_SIZE_MAX)
        fd = memory_file("vdpabridge-inflight", size, sealed=True)
        return InflightRegion(fd, size, 0, queue_count, queue_size)

    def _set_inflight(self, region: InflightRegion | None) -> None:
        if region is None:
            self._drop_inflight()
            return
        part_bytes = region.size_bytes // max(region.queue_count, 1) & ~63
        if not region.queue_count or part_bytes < queue_region_bytes(region.queue_size):
            why = f"{region.size_bytes} bytes do not hold {region.queue_count} queues of {region.queue_size}"
            raise ValueError(f"{self.name}: in-flight region: {why}")
        check_inside(region.fd, region.size_bytes, region.offset)
        mapping = SharedMapping(region.fd, region.size_bytes, region.offset)
        self._drop_inflight()
        self._inflight = (mapping, region, part_bytes)

    def _inflight_table(self, index: int, queue_size: int) -> InflightTable | None:
        if self._inflight is None or index >= self._inflight[1].queue_count:
            return None
        mapping, _, part_bytes = self._inflight
        if queue_region_bytes(queue_size) > part_bytes:
            raise ValueError(f"{queue_size} descriptors do not fit the in-flight region's {part_bytes} bytes for each")
        return InflightTable(mapping.view[index * part_bytes : (index + 1) * part_bytes], queue_size)

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            self._inflight[0].close()
            self._inflight = None
