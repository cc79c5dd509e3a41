"""The waist: the one interface to a virtio device that another program's guest is using.

Drivers (`vdpabridge.drivers`) implement `Device`; exporters and procedures use it, and do not depend on any driver.
Addresses are the guest's own; only a driver knows what its transport calls IOVA or user address.
"""

from __future__ import annotations

import functools
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence, Set
from typing import Concatenate, ParamSpec, Self, TypeVar

from ..abi.vring_base import QueueBase
from ..errors import DeviceFailed, VdpaBridgeError
from .checks import check_address_space, check_config_range, check_mapped, check_queue, check_regions
from .records import DeviceCore
from .rules import Capability, Operation, RunState, permit
from .values import (
    DirtyLog,
    Identity,
    InflightRegion,
    MemoryRegion,
    QueueSetup,
    StateDirection,
    StatePhase,
)

__all__ = ["Device"]


Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def _bounded(
    method: Callable[Concatenate[Device, Arguments], Value],
) -> Callable[Concatenate[Device, Arguments], Value]:
    """Put everything that ``method`` waits for under one deadline."""

    @functools.wraps(method)
    def operation(self: Device, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Value:
        if not self.limit.begin():
            return method(self, *arguments, **options)
        try:
            return method(self, *arguments, **options)
        finally:
            self.limit.end()

    return operation


class Device(DeviceCore):
    """A virtio device under control.

    Public methods check `rules.RULES` and then call the driver's hook of the same name with an underscore. An
    operation that fails leaves the run state as it was, unless the device itself failed. But a start or resume that
    fails may have taken effect: the run state becomes RUNNING unless it is certain that the device does not run.
    Suspend or reset the device to be certain.

    Every operation can raise `StateError` (not in this run state), `MissingCapability` (the device cannot do it),
    `DeadlineExceeded`, `DeviceFailed` (the device gave up), and what its transport raises: `KernelError` for
    vhost-vdpa, `ProtocolError` and `ConnectionLost` for vhost-user. The docstring of an operation says what else it
    raises.

    ``timeout_s`` bounds each operation as a whole; None waits for ever. An instance belongs to one thread at a time.
    An instance holds the device until `close`, which resets the device; use it as a context manager.
    """

    # --- what it is ---

    @property
    def state(self) -> RunState:
        """The run state."""
        return self._state

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Device id, queue count and sizes."""

    @property
    @abstractmethod
    def capabilities(self) -> Set[Capability]:
        """What the device can do, from its feature bits."""

    @property
    @abstractmethod
    def offered_features(self) -> int:
        """Virtio features the device offers a guest; without the bits that only the transport needs."""

    @property
    def address_space_count(self) -> int:
        """How many address spaces the device's queues can see; 1 for all but some vDPA devices."""
        return 1

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor that stands for the device; borrowed."""

    def trace_to(self, say: Callable[[str], None]) -> None:
        """Call ``say`` with one line for each request to the device. A driver that makes no requests ignores it."""

    # --- negotiation and configuration space ---

    @_bounded
    def accept_features(self, features: int) -> None:
        """Accept ``features``. Raises `FeatureError` for bits that are not offered or that the device refuses."""
        after = self._permit(Operation.ACCEPT_FEATURES)
        self._accept_features(features)
        self.accepted_features = features
        self._state = after

    @_bounded
    def read_config(self, offset: int = 0, size_bytes: int | None = None) -> bytes:
        """Bytes of the configuration space; to its end by default. Raises ValueError outside of it."""
        self._permit(Operation.READ_CONFIG)
        whole = self.identity.config_size_bytes
        size = whole - offset if size_bytes is None else size_bytes
        check_config_range(self.name, offset, size, whole)
        return self._read_config(offset, size)

    @_bounded
    def write_config(self, offset: int, data: bytes) -> None:
        """Write into the configuration space. A device ignores writes to read-only fields, without an error."""
        self._permit(Operation.WRITE_CONFIG)
        check_config_range(self.name, offset, len(data), self.identity.config_size_bytes)
        self._write_config(offset, data)

    @_bounded
    def set_config_call(self, eventfd: int | None) -> None:
        """Have the device signal ``eventfd`` (borrowed) when the configuration changes; None for no notification."""
        self._permit(Operation.SET_CONFIG_CALL)
        with self._adopting_config_call(eventfd):
            self._set_config_call(eventfd)

    # --- memory ---

    @_bounded
    def map(self, regions: Sequence[MemoryRegion]) -> None:
        """Map ``regions`` (fds are borrowed) into the device: all of them, or none if this raises.

        Raises ValueError for regions that overlap, or are in an address space that the device does not have;
        `MappingError` or `KernelError` if the device cannot reach one; OSError (EINVAL) for one that goes beyond the
        end of its file.
        """
        self._permit(Operation.MAP)
        check_regions(self.name, regions, self.regions, self.address_space_count)
        with self._adopting(regions) as own:
            self._map(own)

    @_bounded
    def unmap(self, regions: Sequence[MemoryRegion]) -> None:
        """Unmap ``regions``, matched by address, size and address space. ValueError for one that is not mapped."""
        self._permit(Operation.UNMAP)
        gone = check_mapped(self.name, regions, self.regions)
        try:
            self._unmap(gone)
        except BaseException:
            kept = self._still_mapped(gone)
            self._drop([region for region in gone if region not in kept])
            raise
        self._drop(gone)

    # --- queues ---

    @_bounded
    def set_queue(self, index: int, setup: QueueSetup) -> None:
        """Give queue ``index`` its size and addresses.

        Raises ValueError for a queue that the device does not have, as do all methods that take a queue's index.
        """
        self._permit_queue(Operation.SET_QUEUE, index)
        check_address_space(self.name, setup.address_space, self.address_space_count)
        self._set_queue(index, setup)
        self._record(index).setup = setup

    @_bounded
    def set_base(self, index: int, base: QueueBase) -> None:
        """Have queue ``index`` continue at ``base``."""
        self._permit_queue(Operation.SET_BASE, index)
        self._set_base(index, base)
        self._record(index).base = base

    @_bounded
    def get_base(self, index: int) -> QueueBase:
        """Where queue ``index`` stands. Defined only for a device that is not running."""
        self._permit_queue(Operation.GET_BASE, index)
        return self._get_base(index)

    def set_kick(self, index: int, eventfd: int | None) -> None:
        """Have queue ``index`` listen to ``eventfd`` (borrowed); None takes it away."""
        self._set_eventfd(Operation.SET_KICK, index, eventfd)

    def set_call(self, index: int, eventfd: int | None) -> None:
        """Have queue ``index`` signal used buffers on ``eventfd`` (borrowed); None takes it away."""
        self._set_eventfd(Operation.SET_CALL, index, eventfd)

    def set_err(self, index: int, eventfd: int | None) -> None:
        """Have queue ``index`` signal errors on ``eventfd`` (borrowed); None takes it away."""
        self._set_eventfd(Operation.SET_ERR, index, eventfd)

    @_bounded
    def enable_queue(self, index: int, enabled: bool = True) -> None:
        """Let the device process queue ``index`` while it runs, or not; it never processes one that was not set up."""
        self._permit_queue(Operation.ENABLE_QUEUE, index)
        self._enable_queue(index, enabled)
        self._record(index).enabled = enabled

    @_bounded
    def stop_queue(self, index: int, *, drain: bool = True) -> QueueBase:
        """Stop queue ``index`` alone and return where it stands. To have it continue, set its base and enable it.

        ``drain`` is as for `suspend`.
        """
        self._permit_queue(Operation.STOP_QUEUE, index)
        self._check_drain(Operation.STOP_QUEUE, drain)
        self.undrained = self.undrained or not drain
        base = self._stop_queue(index, drain=drain)
        self._record(index).enabled = False
        return base

    # --- run control ---

    @_bounded
    def start(self) -> None:
        """Process enabled queues. The device finds buffers that the guest made available before, without another kick.

        If this raises, the device may run: `state` is RUNNING unless it is certain that the device does not run.
        """
        after = self._permit(Operation.START)
        self._drop_load()
        with self._leading_to(after):
            self._require_time("start")
            self._start()
        self.undrained = False

    @_bounded
    def suspend(self, *, drain: bool = True) -> None:
        """Stop, and remember everything; on return the device does nothing more. Idempotent.

        The device first finishes the requests that it has taken. With ``drain`` off it leaves them unfinished, recorded
        in the in-flight region (`set_inflight`); this needs a device with SKIP_DRAIN.
        """
        after = self._permit(Operation.SUSPEND)
        self._check_drain(Operation.SUSPEND, drain)
        self._require_time("suspend")
        self.undrained = self.undrained or not drain
        self._suspend(drain=drain)
        self._state = after

    @_bounded
    def resume(self) -> None:
        """Continue after `suspend`. The device does the requests that the guest has made since, without another kick.

        If this raises, the device may run: `state` is RUNNING unless it is certain that the device does not run.
        """
        after = self._permit(Operation.RESUME)
        self._drop_load()
        with self._leading_to(after):
            self._require_time("resume")
            self._resume()
        self.undrained = False

    @_bounded
    def reset(self) -> None:
        """Forget features, queues and eventfds. Mapped memory stays mapped.

        The device also forgets its own state, if it can (STATE_RESET). If this raises, the device counts as failed
        until another reset succeeds, because it is not known how much of this one was done.
        """
        after = self._permit(Operation.RESET)
        self._drop_load()
        with self._resetting():
            self._reset()
            self._forget()
        self._state = after

    @_bounded
    def check_health(self) -> None:
        """Ask whether the device has failed by itself. Raises `DeviceFailed` if it has; legal at any time."""
        if self._state is RunState.FAILED:
            raise self._fail(self.failure)
        self._check_health()

    @property
    def _reset_loses_state(self) -> bool:
        return Capability.STATE_RESET in self.capabilities

    def condemn(self, why: str) -> DeviceFailed:
        """Note that the device is unusable until it is reset, because of a failure that only the caller knows of.

        Returns the error for the caller to raise.
        """
        return self._fail(why)

    # --- device state ---

    @_bounded
    def set_state_fd(self, direction: StateDirection, phase: StatePhase, fd: int) -> int | None:
        """Begin a transfer of the device's internal state through ``fd``, a pipe or anything that reads like one.

        Takes ownership of ``fd``, also if this raises. Returns None if the transfer goes through ``fd``; otherwise a
        descriptor of the device's own choice, owned by the caller, to be used instead of the caller's end. The writer
        closes its end when everything is written; then call `check_state`. Start, resume, reset and another transfer
        end a transfer that was not checked, as `abandon_state` does.
        """
        try:
            self._permit(Operation.SET_STATE_FD)
        except BaseException:
            os.close(fd)
            raise
        self._drop_load()
        self._loading = direction is StateDirection.LOAD
        return self._set_state_fd(direction, phase, fd)

    @_bounded
    def check_state(self) -> None:
        """Wait for the end of a transfer. All of the state has arrived only if this does not raise.

        Raises `StateRefused` or `PeerRefused` if the device did not take or give it.
        """
        self._permit(Operation.CHECK_STATE)
        if self._loading:
            # also if it fails: not every device is then as it was
            self._loading = False
            self.state_version += 1
        self._check_state()

    @_bounded
    def abandon_state(self) -> None:
        """End a transfer that the caller will not check; does nothing if there is none. The caller has closed its end.

        The device is as it was before the transfer. But a back-end that cannot be told to end it keeps a load that it
        has received completely.
        """
        self._permit(Operation.ABANDON_STATE)
        self._drop_load()
        self._abandon_state()

    # --- dirty log and in-flight requests ---

    @_bounded
    def set_dirty_log(self, log: DirtyLog | None) -> None:
        """Have the device record in ``log`` the pages that it writes from now on; None ends that."""
        self._permit(Operation.SET_DIRTY_LOG)
        with self._adopting_dirty_log(log):
            self._set_dirty_log(log)

    @_bounded
    def get_inflight(self, queue_count: int, queue_size: int) -> InflightRegion:
        """An in-flight region for ``queue_count`` queues of ``queue_size``; the caller owns its descriptor."""
        self._permit(Operation.GET_INFLIGHT)
        return self._get_inflight(queue_count, queue_size)

    @_bounded
    def set_inflight(self, region: InflightRegion | None) -> None:
        """Give a region back to the device, which continues the requests recorded there; its ``fd`` is borrowed.

        None: the device forgets its region and the requests recorded there.
        """
        self._permit(Operation.SET_INFLIGHT)
        with self._adopting_inflight(region):
            self._set_inflight(region)

    # --- life cycle ---

    @_bounded
    def close(self) -> None:
        """Let go of the device; the transport now does what it does to one without an owner (a reset). Idempotent."""
        with self._letting_go():
            self._close()

    @_bounded
    def give_up(self) -> bool:
        """Let go of a device that does not answer, as `close` does; returns whether the device does nothing any more.

        True only if that is certain: the kernel has taken the device back, or every queue was stopped, or the process
        that had the queues has ended. This waits for that process to end.
        """
        with self._letting_go():
            return self._give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {'closed' if self._closed else self._state.value}>"

    # --- for drivers ---

    def _permit(self, operation: Operation) -> RunState:
        if self._closed:
            raise VdpaBridgeError(operation.value, device=self.name, why="the device was closed", hint="open it again")
        return permit(self.name, operation, self._state, self.capabilities)

    def _permit_queue(self, operation: Operation, index: int) -> None:
        self._permit(operation)
        check_queue(self.name, index, self.identity.queue_count)

    @_bounded
    def _set_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None:
        self._permit_queue(operation, index)
        with self._adopting_eventfd(operation, index, eventfd):
            self._bind_eventfd(operation, index, eventfd)

    def _check_drain(self, operation: Operation, drain: bool) -> None:
        if not drain and Capability.SKIP_DRAIN not in self.capabilities:
            raise self._lacks(operation, Capability.SKIP_DRAIN)
