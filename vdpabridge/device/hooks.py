"""What a driver implements: the hooks that `vdpabridge.device.Device` calls once it has found an operation legal.

Each hook does what the public method of the same name promises. The public method has already checked the run state,
the capability, the queue's number and the range.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..abi.vring_base import QueueBase
from ..errors import MissingCapability
from .rules import ALTERNATIVES, Capability, Operation
from .values import DirtyLog, InflightRegion, MemoryRegion, QueueSetup, StateDirection, StatePhase

__all__ = ["DriverHooks"]


class DriverHooks(ABC):
    """The hooks. Those that need a capability raise `MissingCapability` here; a driver that has it overrides them."""

    name: str

    def _lacks(self, operation: Operation, capability: Capability) -> MissingCapability:
        return MissingCapability(self.name, operation.value, capability.value, ALTERNATIVES[capability])

    @abstractmethod
    def _accept_features(self, features: int) -> None: ...
    @abstractmethod
    def _read_config(self, offset: int, size: int) -> bytes: ...
    @abstractmethod
    def _map(self, regions: Sequence[MemoryRegion]) -> None: ...
    @abstractmethod
    def _unmap(self, regions: Sequence[MemoryRegion]) -> None: ...

    @abstractmethod
    def _set_queue(self, index: int, setup: QueueSetup) -> None: ...
    @abstractmethod
    def _set_base(self, index: int, base: QueueBase) -> None: ...
    @abstractmethod
    def _get_base(self, index: int) -> QueueBase: ...
    @abstractmethod
    def _bind_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None: ...
    @abstractmethod
    def _enable_queue(self, index: int, enabled: bool) -> None: ...
    @abstractmethod
    def _check_health(self) -> None: ...
    @abstractmethod
    def _start(self) -> None: ...
    @abstractmethod
    def _reset(self) -> None: ...
    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _is_idle(self) -> bool: ...

    def _still_mapped(self, regions: Sequence[MemoryRegion]) -> Sequence[MemoryRegion]:
        """Those of ``regions`` that still count as mapped after `_unmap` of ``regions`` failed."""
        return regions

    def _give_up(self) -> bool:
        self._close()
        return True

    @property
    def _keeps_what_is_abandoned(self) -> bool:
        """Whether a load that is abandoned may have its effect all the same: if nothing tells the device to drop it."""
        return False

    # A driver that claims the capability overrides the hook.

    def _write_config(self, offset: int, data: bytes) -> None:
        raise self._lacks(Operation.WRITE_CONFIG, Capability.CONFIG_WRITE)

    def _set_config_call(self, eventfd: int | None) -> None:
        raise self._lacks(Operation.SET_CONFIG_CALL, Capability.CONFIG_CALL)

    def _stop_queue(self, index: int, *, drain: bool) -> QueueBase:
        raise self._lacks(Operation.STOP_QUEUE, Capability.QUEUE_CONTROL)

    def _suspend(self, *, drain: bool) -> None:
        raise self._lacks(Operation.SUSPEND, Capability.SUSPEND)

    def _resume(self) -> None:
        raise self._lacks(Operation.RESUME, Capability.RESUME)

    def _set_state_fd(self, direction: StateDirection, phase: StatePhase, fd: int) -> int | None:
        os.close(fd)
        raise self._lacks(Operation.SET_STATE_FD, Capability.DEVICE_STATE)

    def _check_state(self) -> None:
        raise self._lacks(Operation.CHECK_STATE, Capability.DEVICE_STATE)

    def _abandon_state(self) -> None:
        raise self._lacks(Operation.ABANDON_STATE, Capability.DEVICE_STATE)

    def _set_dirty_log(self, log: DirtyLog | None) -> None:
        raise self._lacks(Operation.SET_DIRTY_LOG, Capability.DIRTY_LOG)

    def _get_inflight(self, queue_count: int, queue_size: int) -> InflightRegion:
        raise self._lacks(Operation.GET_INFLIGHT, Capability.INFLIGHT)

    def _set_inflight(self, region: InflightRegion | None) -> None:
        raise self._lacks(Operation.SET_INFLIGHT, Capability.INFLIGHT)
