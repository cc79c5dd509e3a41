"""A device over another one, to which it passes everything on: what a layer changes, it overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager

from ..abi.vring_base import QueueBase
from ..device import (
    Capability,
    Device,
    Identity,
    MemoryRegion,
    Operation,
    QueueSetup,
    RunState,
    StateDirection,
    StatePhase,
)
from ..errors import VdpaBridgeError

__all__ = ["Layer"]

_BINDERS = {Operation.SET_KICK: Device.set_kick, Operation.SET_CALL: Device.set_call, Operation.SET_ERR: Device.set_err}


class Layer(Device):
    """Takes ownership of ``below``. It has the same deadlines, and fails with it."""

    def __init__(self, below: Device) -> None:
        super().__init__(below.name, below.limit)
        self.below = below

    def __contains__(self, kind: type[Device]) -> bool:
        """Whether it, or something below it, is of ``kind``."""
        if isinstance(self, kind) or isinstance(self.below, kind):
            return True
        return isinstance(self.below, Layer) and kind in self.below

    # --- what it is ---

    @property
    def identity(self) -> Identity:
        return self.below.identity

    @property
    def capabilities(self) -> Set[Capability]:
        return self.below.capabilities

    @property
    def offered_features(self) -> int:
        return self.below.offered_features

    @property
    def address_space_count(self) -> int:
        return self.below.address_space_count

    def fileno(self) -> int:
        return self.below.fileno()

    def trace_to(self, say: Callable[[str], None]) -> None:
        self.below.trace_to(say)

    # --- the hooks ---

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        try:
            yield
        except VdpaBridgeError as error:
            if self.below.state is RunState.FAILED:
                raise self._fail(self.below.failure) from error
            raise

    def _accept_features(self, features: int) -> None:
        with self._failing_together():
            self.below.accept_features(features)

    def _read_config(self, offset: int, size: int) -> bytes:
        return self.below.read_config(offset, size)

    def _write_config(self, offset: int, data: bytes) -> None:
        self.below.write_config(offset, data)

    def _set_config_call(self, eventfd: int | None) -> None:
        self.below.set_config_call(eventfd)

    def _map(self, regions: Sequence[MemoryRegion]) -> None:
        with self._failing_together():
            self.below.map(regions)

    def _unmap(self, regions: Sequence[MemoryRegion]) -> None:
        with self._failing_together():
            self.below.unmap(regions)

    def _still_mapped(self, regions: Sequence[MemoryRegion]) -> Sequence[MemoryRegion]:
        below = {(each.guest_address, each.address_space) for each in self.below.regions}
        return [each for each in regions if (each.guest_address, each.address_space) in below]

    def _set_queue(self, index: int, setup: QueueSetup) -> None:
        self.below.set_queue(index, setup)

    def _set_base(self, index: int, base: QueueBase) -> None:
        self.below.set_base(index, base)

    def _get_base(self, index: int) -> QueueBase:
        return self.below.get_base(index)

    def _bind_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None:
        _BINDERS[operation](self.below, index, eventfd)

    def _enable_queue(self, index: int, enabled: bool) -> None:
        self.below.enable_queue(index, enabled)

    def _check_health(self) -> None:
        with self._failing_together():
            self.below.check_health()

    def _start(self) -> None:
        with self._failing_together():
            self.below.start()

    def _suspend(self, *, drain: bool) -> None:
        with self._failing_together():
            self.below.suspend(drain=drain)

    def _resume(self) -> None:
        with self._failing_together():
            self.below.resume()

    def _set_state_fd(self, direction: StateDirection, phase: StatePhase, fd: int) -> int | None:
        with self._failing_together():
            return self.below.set_state_fd(direction, phase, fd)

    def _check_state(self) -> None:
        with self._failing_together():
            self.below.check_state()

    def _abandon_state(self) -> None:
        with self._failing_together():
            self.below.abandon_state()

    @property
    def _keeps_what_is_abandoned(self) -> bool:
        return self.below._keeps_what_is_abandoned

    def _reset(self) -> None:
        with self._failing_together():
            self.below.reset()

    def _is_idle(self) -> bool:
        return self.below.is_idle()

    def _close(self) -> None:
        self.below.close()

    def _give_up(self) -> bool:
        return self.below.give_up()
