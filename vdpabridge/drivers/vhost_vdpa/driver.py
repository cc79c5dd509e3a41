"""`VhostVdpa`: the device interface over ``/dev/vhost-vdpa-N``."""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Concatenate, ParamSpec, Self, TypeVar

from ...abi.vhost import (
    BACKEND_FEATURE_NAMES,
    VHOST_BACKEND_F_DESC_ASID,
    VHOST_BACKEND_F_IOTLB_ASID,
    VHOST_BACKEND_F_IOTLB_PERSIST,
    VhostIoctl as Ioctl,
)
from ...abi.virtio import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_RING_PACKED,
)
from ...device import (
    Capability,
    Device,
    Identity,
    MemoryRegion,
    Operation,
    QueueBase,
    QueueSetup,
    RunState,
    StateDirection,
    StatePhase,
    decode_base,
)
from ...errors import DeadlineExceeded, FeatureError, KernelError
from ...linux.descriptors import discard
from ...linux.eventfds import signal
from ...linux.mappings import SharedMapping
from .groups import Groups
from .ioctls import ROWS
from .iotlb import Iotlb, IotlbBroken
from .kernel_eventfds import KernelEventfds
from .kernel_requests import KernelRequests
from .kernel_state import KernelState
from .node import Node
from .regions import Regions
from .state_requests import OURS, StateRequests
from .status_byte import LIVE, NEGOTIATED, READY, StatusByte
from .system import LINUX, System

__all__ = ["VhostVdpa"]

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")
_ACCESS_PLATFORM = 1 << VIRTIO_F_ACCESS_PLATFORM
_KNOWN_BACKEND_FEATURES = sum(1 << bit for bit in BACKEND_FEATURE_NAMES)


def _under_one_deadline(
    hook: Callable[Concatenate[VhostVdpa, Arguments], Value],
) -> Callable[Concatenate[VhostVdpa, Arguments], Value]:
    """Put all requests that ``hook`` makes under one deadline, which costs as much as a deadline for one."""

    @functools.wraps(hook)
    def bounded(self: VhostVdpa, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Value:
        return self._node.together(hook.__name__.strip("_"), lambda: hook(self, *arguments, **options))

    return bounded


class VhostVdpa(Device):
    """A device behind vhost-vdpa, owned by this process until `close`.

    Opening and closing reset the device. It belongs to the process that opened it: not to a forked child, and no
    longer to this one after execve. One thread at a time.
    """

    def __init__(
        self,
        node: Node,
        *,
        backend_features: int | None = None,
        timeout_s: float | None = None,
        state_requests: StateRequests = OURS,
    ) -> None:
        """Take ownership of ``node``, closing it if this raises. Prefer `open`.

        ``backend_features`` are the VHOST_BACKEND_F bits to accept, by default all that are offered and known here.
        ``state_requests``: how the kernel transfers device state, if it does.
        """
        self._node = node
        self._ask = KernelRequests(node)
        self._transfer = KernelState(node, state_requests)
        self._state_feature = state_requests.feature
        self._status = StatusByte(self._ask, self._fail)
        self._eventfds = KernelEventfds(self._ask)
        self._enabled: set[int] = set()
        """Queues that a failed start may have told the kernel to enable since the last reset."""
        super().__init__(node.path, node.limit)
        if timeout_s is not None:
            self.timeout_s = timeout_s
        try:
            node.call(Ioctl.VHOST_SET_OWNER)
            self.backend_features = self._accept_backend_features(backend_features)
            self._identity = self._identify()
            self.group_count = self._ask.get(Ioctl.VHOST_VDPA_GET_GROUP_NUM)
            told_apart = bool(self.backend_features >> VHOST_BACKEND_F_DESC_ASID & 1)
            self._groups = Groups(self.name, self._ask, rings_apart=told_apart)
            # without the bit the kernel treats every address space as 0
            told_spaces = bool(self.backend_features >> VHOST_BACKEND_F_IOTLB_ASID & 1)
            self._address_space_count = self._ask.get(Ioctl.VHOST_VDPA_GET_AS_NUM) if told_spaces else 1
            self.iotlb = Iotlb(node, self._ask.iova_range(), self.backend_features)
            self._regions = Regions(self.name, self.iotlb)
        except BaseException:
            node.close()
            raise
        self._capabilities = frozenset(
            {Capability.CONFIG_WRITE, Capability.CONFIG_CALL, Capability.STATE_RESET}
            | {
                row.capability
                for row in ROWS.values()
                if row.capability is not None and row.feature is not None and self.backend_features >> row.feature & 1
            }
        )
        # not in a row: the bit can be that of somebody else's proposal
        if self.backend_features >> self._state_feature & 1:
            self._capabilities |= {Capability.DEVICE_STATE}

    @classmethod
    def open(
        cls,
        path: str,
        *,
        backend_features: int | None = None,
        timeout_s: float | None = None,
        state_requests: StateRequests = OURS,
        system: System = LINUX,
    ) -> Self:
        """Open ``path`` (``/dev/vhost-vdpa-0``) and become the device's owner. Raises `NodeError`, `KernelError`."""
        return cls(
            Node.open(path, system, timeout_s=timeout_s),
            backend_features=backend_features,
            timeout_s=timeout_s,
            state_requests=state_requests,
        )

    # --- what it is ---

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def capabilities(self) -> Set[Capability]:
        return self._capabilities

    @property
    def offered_features(self) -> int:
        """Without ACCESS_PLATFORM: for vhost-vdpa, addresses are always IOVAs, and that does not concern a guest."""
        return self._ask.get(Ioctl.VHOST_GET_FEATURES) & ~_ACCESS_PLATFORM

    @property
    def status(self) -> int:
        """The device's status byte as it is now."""
        return self._status.read()

    @property
    def address_space_count(self) -> int:
        return self._address_space_count

    def fileno(self) -> int:
        return self._node.fileno()

    def trace_to(self, say: Callable[[str], None]) -> None:
        self._node.trace_to(say)

    # --- vhost-vdpa's own: queue groups, sizes, doorbells ---

    def queue_group(self, index: int) -> int:
        """The group of queue ``index``; the queues of a group share an address space."""
        return self._groups.of_buffers(index)

    def queue_descriptor_group(self, index: int) -> int:
        """The group of queue ``index``'s rings, if they can be in another than its buffers (DESC_ASID)."""
        return self._groups.of_rings(index)

    def queue_size_max(self, index: int) -> int:
        """The most descriptors queue ``index`` can have; most devices have one answer for all queues (`Identity`)."""
        return self._ask.get_of_queue(Ioctl.VHOST_VDPA_GET_VRING_SIZE, index)

    def ioctl(self, request: int, argument: bytearray | int = 0) -> int:
        """Make the ioctl with number ``request``; a buffer is changed in place. Nothing about it need be known here.

        For requests that a kernel is about to get. Returns what the kernel returned. Raises `KernelError`,
        `DeadlineExceeded`, `OwnershipError`.
        """
        return self._node.call(request, argument)

    def map_doorbell(self, index: int) -> SharedMapping:
        """The doorbell page of queue ``index``, write-only, owned by the caller.

        Raises `KernelError`: ENOTSUPP (524) if the device has no doorbell (the simulator, VDUSE, snet, eni) or its
        doorbell area is not one page. The device stays open until the mapping is closed.
        """
        page = mmap.PAGESIZE
        try:
            return SharedMapping(self.fileno(), page, index * page, protection=mmap.PROT_WRITE)
        except OSError as error:
            why = "no doorbell page for this queue"
            raise KernelError(
                error.errno or 0, "mmap doorbell", device=self.name, why=why, hint="kick by eventfd", queue=index
            ) from None

    # --- negotiation ---

    def _accept_backend_features(self, wanted: int | None) -> int:
        # a parent may report bits that SET then refuses, so bits that are not known here are never acknowledged
        offered = self._ask.get(Ioctl.VHOST_GET_BACKEND_FEATURES)
        known = _KNOWN_BACKEND_FEATURES | 1 << self._state_feature
        features: int = offered & known & (known if wanted is None else wanted)
        if not features >> VHOST_BACKEND_F_IOTLB_ASID & 1:
            features &= ~(1 << VHOST_BACKEND_F_DESC_ASID)
        self._ask.set(Ioctl.VHOST_SET_BACKEND_FEATURES, features)
        return features

    def _identify(self) -> Identity:
        return Identity(
            device_id=self._ask.get(Ioctl.VHOST_VDPA_GET_DEVICE_ID),
            queue_count=self._ask.get(Ioctl.VHOST_VDPA_GET_VQS_COUNT),
            queue_size_max=self._ask.get(Ioctl.VHOST_VDPA_GET_VRING_NUM),
            config_size_bytes=self._ask.get(Ioctl.VHOST_VDPA_GET_CONFIG_SIZE),
        )

    @_under_one_deadline
    def _accept_features(self, features: int) -> None:
        if self._status.read() != 0:
            # an earlier attempt did not complete, and left this status
            self._reset_whole()
        offered = self._ask.get(Ioctl.VHOST_GET_FEATURES)
        # as in `offered_features`, so that an accepted bit is always an offered one, also on the device that the state
        # moves to
        if unknown := features & ~(offered & ~_ACCESS_PLATFORM):
            # vdpa_sim silently drops bits that it does not offer
            raise FeatureError(self.name, f"bits {unknown:#x} are not offered", unknown)
        try:
            self._status.write(VIRTIO_CONFIG_S_ACKNOWLEDGE)
            self._status.write(READY)
            acknowledged = features | (offered & _ACCESS_PLATFORM)
            self._ask.set(Ioctl.VHOST_SET_FEATURES, acknowledged)
            self._status.request(NEGOTIATED)
            if not self._status.read() & VIRTIO_CONFIG_S_FEATURES_OK:
                raise FeatureError(self.name, f"the device refused {features:#x}: it did not set FEATURES_OK", features)
        except (FeatureError, KernelError):
            self._reset_whole()
            raise

    # --- configuration space ---

    @_under_one_deadline
    def _read_config(self, offset: int, size: int) -> bytes:
        return self._ask.read_config(offset, size)

    def _write_config(self, offset: int, data: bytes) -> None:
        self._ask.write_config(offset, data)

    def _set_config_call(self, eventfd: int | None) -> None:
        self._eventfds.bind(Operation.SET_CONFIG_CALL, 0, eventfd)

    # --- memory ---

    def _map(self, regions: Sequence[MemoryRegion]) -> None:
        with self._in_order():
            self._regions.map(regions)

    def _unmap(self, regions: Sequence[MemoryRegion]) -> None:
        with self._in_order():
            self._regions.unmap(regions)

    def _still_mapped(self, _regions: Sequence[MemoryRegion]) -> Sequence[MemoryRegion]:
        # whether they are still mapped or not, they are unmapped before anything else happens
        return ()

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """Mark the device as failed if it is no longer known which memory it has."""
        try:
            yield
        except IotlbBroken as error:
            raise self._fail(f"{error.what}: {error.why}") from error

    # --- queues ---

    @_under_one_deadline
    def _set_queue(self, index: int, setup: QueueSetup) -> None:
        if self.group_count > 1:
            setups = {other: record.setup for other, record in self.queues.items() if record.setup is not None}
            self._groups.assign(index, setup.address_space, setups)
        elif setup.address_space:
            raise ValueError(
                f"{self.name}: address space {setup.address_space} for queue {index}: all its queues are in 0"
            )
        self._ask.set_of_queue(Ioctl.VHOST_SET_VRING_NUM, index, setup.size)
        self._ask.set_addresses(index, setup)

    def _set_base(self, index: int, base: QueueBase) -> None:
        self._ask.set_of_queue(Ioctl.VHOST_SET_VRING_BASE, index, base.encode())

    def _get_base(self, index: int) -> QueueBase:
        word = self._ask.get_of_queue(Ioctl.VHOST_GET_VRING_BASE, index)
        return decode_base(word, packed=bool(self.accepted_features >> VIRTIO_F_RING_PACKED & 1))

    def _bind_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None:
        self._eventfds.bind(operation, index, eventfd)

    def _enable_queue(self, index: int, enabled: bool) -> None:
        # a queue takes its addresses and base when it is enabled, so before start() that can wait until everything is
        # known; VDUSE's daemon notices a queue that is enabled later only if it checks
        if self.state is RunState.RUNNING and self._is_set_up(index):
            self._ask.set_of_queue(Ioctl.VHOST_VDPA_SET_VRING_ENABLE, index, enabled)
            if enabled:
                self._kick(index)

    def _is_set_up(self, index: int) -> bool:
        return index in self.queues and self.queues[index].setup is not None

    def _kick(self, index: int) -> None:
        """Write the queue's own kick eventfd: a kick from before it was enabled and started is lost."""
        signal(self.queues[index].eventfds.get(Operation.SET_KICK))

    def _enabled_queues(self) -> list[int]:
        return [index for index, record in self.queues.items() if record.enabled and record.setup]

    def _kick_enabled(self) -> None:
        for index in self._enabled_queues():
            self._kick(index)

    # --- run control ---

    @_under_one_deadline
    def _start(self) -> None:
        self._status.require_negotiated()
        self._transfer.abandon()
        with self._in_order():
            self._regions.settle()
        # a queue that a failed start has enabled may have been disabled or moved since then, and a queue takes its
        # addresses and its base when it is enabled: so disable it first
        for index in sorted(self._enabled):
            self._ask.set_of_queue(Ioctl.VHOST_VDPA_SET_VRING_ENABLE, index, False)
            self._enabled.discard(index)
        for index in self._enabled_queues():
            self._enabled.add(index)
            self._ask.set_of_queue(Ioctl.VHOST_VDPA_SET_VRING_ENABLE, index, True)
        self._status.write(LIVE)
        self._enabled.clear()
        self._kick_enabled()

    @_under_one_deadline
    def _suspend(self, *, drain: bool) -> None:
        self._status.require_live()
        self._node.call(Ioctl.VHOST_VDPA_SUSPEND)

    @_under_one_deadline
    def _resume(self) -> None:
        # by this request only: rewriting the status byte resumes vdpa_sim without vhost noticing
        self._status.require_live()
        self._transfer.abandon()
        self._node.call(Ioctl.VHOST_VDPA_RESUME)
        self._kick_enabled()

    @_under_one_deadline
    def _check_health(self) -> None:
        if self.state in (RunState.RUNNING, RunState.SUSPENDED):
            self._status.require_live()
        else:
            self._status.require_in_order()

    # --- device state ---

    def _set_state_fd(self, direction: StateDirection, phase: StatePhase, fd: int) -> int:
        discard([fd])  # the kernel makes the channel
        return self._begin_state(direction, phase)

    @_under_one_deadline
    def _begin_state(self, direction: StateDirection, phase: StatePhase) -> int:
        return self._transfer.begin(direction, phase)

    def _check_state(self) -> None:
        self._transfer.check(self.limit.deadline())

    @property
    def _keeps_what_is_abandoned(self) -> bool:
        return self._transfer.keeps_what_is_abandoned

    @_under_one_deadline
    def _abandon_state(self) -> None:
        self._transfer.abandon()

    # --- reset ---

    def _reset_whole(self) -> None:
        """A reset that this driver needs for itself."""
        with self._resetting():
            self._reset()

    def _reset(self) -> None:
        self._status.request(0)
        self._transfer.forget()
        self._status.await_reset(self.limit.deadline(), device=self.name, stuck=lambda: self._node.stuck)
        self._groups.forget()
        try:
            self._set_up_after_reset()
        except Exception as error:
            # it is reset, but not all of its setup after the reset is done
            raise self._fail(f"after its reset: {error}") from error

    def _set_up_after_reset(self) -> None:
        self._eventfds.unbind_all()
        self._enabled.clear()
        with self._in_order():
            if self.backend_features >> VHOST_BACKEND_F_IOTLB_PERSIST & 1:
                self._regions.map_missing()
            else:
                self._regions.map_again()

    def _close(self) -> None:
        if self._node.usable:
            # first stop the device, then take its memory away: the kernel's own close uses this order too, but does not
            # tell VDUSE's daemon, which would keep the memory. A dead device is closed anyway
            with contextlib.suppress(KernelError, DeadlineExceeded, IotlbBroken):
                self._status.request(0)
                self._regions.forget_everything()
        try:
            self._node.close()
        finally:
            self._transfer.forget()
            if self._node.stuck:
                self._regions.abandon()
            else:
                self._regions.close()

    def _is_idle(self) -> bool:
        return self._node.usable and self._status.is_idle

    def _give_up(self) -> bool:
        usable = self._node.usable
        self._close()
        # with a request still in the kernel, the kernel takes the device back only when that request ends
        return usable and not self._node.stuck
