"""`VhostUser`: the device interface over a vhost-user socket, as its front-end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Self

from ...abi.vhost import VHOST_F_LOG_ALL
from ...abi.vhost_user import VHOST_USER_F_PROTOCOL_FEATURES, ConfigFlags, FrontendRequest, ProtocolFeature
from ...abi.vhost_user_payloads import U64, Config, Inflight, Log
from ...abi.virtio import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_ACCESS_PLATFORM,
)
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
    StateDirection,
    StatePhase,
)
from ...errors import ConnectionLost, DeadlineExceeded, FeatureError, PeerRefused, ProtocolError, VdpaBridgeError
from ...linux.deadline import NOW
from ...linux.descriptors import discard
from ...vhost_user.connection import Connection
from ...vhost_user.peer import PeerProcess
from .backend_memory import BackendMemory, slots_of
from .backend_requests import BackendRequests
from .backend_rings import BackendRings
from .backend_state import BackendState
from .channel import BackendChannel
from .negotiation import QUEUE_SIZE_MAX, capabilities_of, config_size_of, negotiate, queue_count_of

__all__ = ["VhostUser"]

_LOG_ALL = 1 << VHOST_F_LOG_ALL
_PROTOCOL_FEATURES = 1 << VHOST_USER_F_PROTOCOL_FEATURES
#: Only the transport needs these, not a guest: see also `VhostVdpa.offered_features`.
_TRANSPORT_FEATURES = _LOG_ALL | _PROTOCOL_FEATURES | 1 << VIRTIO_F_ACCESS_PLATFORM
_NEGOTIATED = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK


class VhostUser(Device):
    """A device behind a vhost-user socket, of which this process is the front-end until `close`.

    Suspended means: every ring was stopped by GET_VRING_BASE. No message suspends a device, and stopping its rings does
    not reset it: it keeps its state. After a reply that does not come, or is not valid, the connection is useless and
    the device has failed. But GET_VRING_BASE and CHECK_DEVICE_STATE may take as long as the device's work: if their
    deadline passes, ask again. One thread at a time.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        device_id: int | None = None,
        queue_count: int | None = None,
        config_size_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Take ownership of ``connection``, closing it if this raises, and negotiate. Prefer `open`.

        The protocol tells neither what a device is nor how large its configuration space is, nor, without MQ, how
        many queues it has: ``device_id``, ``config_size_bytes`` and ``queue_count`` say so if it matters.
        """
        self._requests = BackendRequests(connection)
        super().__init__(connection.peer, self._requests.limit)
        if timeout_s is not None:
            self.timeout_s = timeout_s
        try:
            self._features = negotiate(self._requests)
            count = queue_count_of(self._requests, device_id, queue_count)
            self._memory = BackendMemory(self._requests, slots_of(self._requests))
            self._requests.tell(FrontendRequest.SET_OWNER)
            size = config_size_of(self._requests, device_id, config_size_bytes)
            self._process = PeerProcess(connection.fileno())
        except BaseException:
            connection.close()
            raise
        self._identity = Identity(device_id, count, QUEUE_SIZE_MAX, size)
        self._capabilities = capabilities_of(self._requests, self._features, size)
        self._rings = BackendRings(self._requests, self._features)
        self._channel: BackendChannel | None = None
        self._logging = False
        self._inflight_size: tuple[int, int] | None = None
        """The number and size of the queues in the in-flight region that the back-end may have."""
        self._transfer = BackendState(self._requests)

    @classmethod
    def open(
        cls,
        path: str,
        *,
        device_id: int | None = None,
        queue_count: int | None = None,
        config_size_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> Self:
        """Connect to the back-end that listens at ``path``. Raises `ConnectionLost`, `ProtocolError`, OSError."""
        connection = Connection.connect(path, timeout_s=timeout_s)
        return cls(
            connection,
            device_id=device_id,
            queue_count=queue_count,
            config_size_bytes=config_size_bytes,
            timeout_s=timeout_s,
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
        return self._features & ~_TRANSPORT_FEATURES

    @property
    def protocol_features(self) -> int:
        """The protocol features that were negotiated, as bits of `abi.vhost_user.ProtocolFeature`."""
        return self._requests.protocol_features

    def fileno(self) -> int:
        return self._requests.connection.fileno()

    # --- negotiation ---

    def _accept_features(self, features: int) -> None:
        if unknown := features & ~self.offered_features:
            raise FeatureError(self.name, f"bits {unknown:#x} are not offered", unknown)
        with self._asking():
            try:
                self._set_features(features)
                self._check_features_ok(features)
            except PeerRefused as error:
                raise FeatureError(self.name, error.why, features) from error

    def _set_features(self, features: int) -> None:
        transport = (self._features & _PROTOCOL_FEATURES) | (_LOG_ALL if self._logging else 0)
        self._requests.tell(FrontendRequest.SET_FEATURES, U64(features | transport))

    def _check_features_ok(self, features: int) -> None:
        """Ask whether the device keeps FEATURES_OK, as QEMU does, if there is a status byte.

        Only `_reset` writes 0: some back-ends (DPDK) ignore it, and others reset.
        """
        if not self._requests.has(ProtocolFeature.STATUS):
            return
        self._requests.tell(FrontendRequest.SET_STATUS, U64(_NEGOTIATED))
        if not self._requests.ask_u64(FrontendRequest.GET_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK:
            raise FeatureError(self.name, f"the device refused {features:#x}: it did not keep FEATURES_OK", features)

    # --- configuration space ---

    def _read_config(self, offset: int, size: int) -> bytes:
        request = Config(offset, size, ConfigFlags.GUEST_WRITE, bytes(size))
        with self._asking():
            reply = self._requests.ask(FrontendRequest.GET_CONFIG, request)
        if len(reply.data) != size or reply.offset != offset:
            why = f"the back-end gave {len(reply.data)} of {size} bytes at {offset}"
            raise PeerRefused("GET_CONFIG", peer=self.name, why=why, request=FrontendRequest.GET_CONFIG)
        data: bytes = reply.data
        return data

    def _write_config(self, offset: int, data: bytes) -> None:
        with self._asking():
            self._requests.tell(FrontendRequest.SET_CONFIG, Config(offset, len(data), ConfigFlags.GUEST_WRITE, data))

    def _set_config_call(self, eventfd: int | None) -> None:
        if self._channel is None:
            channel = BackendChannel(self.name)
            try:
                with self._asking():
                    self._requests.tell(FrontendRequest.SET_BACKEND_REQ_FD, None, [channel.backend_fd])
            except BaseException:
                channel.close()
                raise
            self._channel = channel
        self._channel.set_config_call(eventfd)

    # --- memory ---

    def _map(self, regions: Sequence[MemoryRegion]) -> None:
        with self._asking():
            self._memory.map(regions)

    def _unmap(self, regions: Sequence[MemoryRegion]) -> None:
        with self._asking():
            self._memory.unmap(regions)

    def _still_mapped(self, regions: Sequence[MemoryRegion]) -> Sequence[MemoryRegion]:
        return [region for region in regions if self._memory.has(region)]

    # --- queues: what the caller sets while a ring is stopped is sent when it starts ---

    def _set_queue(self, index: int, setup: QueueSetup) -> None:
        self._require_stopped(index, Operation.SET_QUEUE)

    def _set_base(self, index: int, base: QueueBase) -> None:
        self._require_stopped(index, Operation.SET_BASE)
        base.encode()
        self._rings.bases[index] = base

    def _get_base(self, index: int) -> QueueBase:
        return self._rings.base(index, self.accepted_features)

    def _bind_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None:
        if index in self._rings.started:
            with self._asking():
                self._rings.bind(operation, index, eventfd)

    def _enable_queue(self, index: int, enabled: bool) -> None:
        if self.state is not RunState.RUNNING or index not in self.queues or self.queues[index].setup is None:
            return
        with self._asking():
            if index in self._rings.started:
                self._rings.enable(index, enabled)
            elif enabled:
                self._rings.start({index: self.queues[index]}, self.accepted_features, logged=self._logging)

    def _stop_queue(self, index: int, *, drain: bool) -> QueueBase:
        with self._asking():
            self._rings.stop(index, self.accepted_features, drain=drain)
        return self._get_base(index)

    def _require_stopped(self, index: int, operation: Operation) -> None:
        if index in self._rings.started:
            why, hint = "the queue is being processed", "stop it first"
            raise VdpaBridgeError(f"{operation.value} ({index})", device=self.name, why=why, hint=hint)

    # --- run control ---

    def _start(self) -> None:
        self._abandon_state()
        with self._asking():
            try:
                self._memory.settle()
                ready = {index: each for index, each in self.queues.items() if each.enabled and each.setup is not None}
                self._rings.start(ready, self.accepted_features, logged=self._logging)
                if self._requests.has(ProtocolFeature.STATUS):
                    self._requests.tell(FrontendRequest.SET_STATUS, U64(_NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK))
            except BaseException:
                with contextlib.suppress(ProtocolError, DeadlineExceeded):
                    self._stop_rings(drain=True)
                raise

    def _is_idle(self) -> bool:
        # it may take a moment after the socket was closed until the process is known to have ended
        return not self._rings.started or self._process.has_ended(self.limit.left_s())

    def _resume(self) -> None:
        self._start()

    def _suspend(self, *, drain: bool) -> None:
        with self._asking():
            self._stop_rings(drain=drain)

    def _stop_rings(self, *, drain: bool) -> None:
        for index in sorted(self._rings.started):
            with self._part(f"queue {index}"):
                self._rings.stop(index, self.accepted_features, drain=drain)

    def _reset(self) -> None:
        self._abandon_state()
        with self._asking():
            self._stop_rings(drain=True)
            if self._requests.has(ProtocolFeature.RESET_DEVICE):
                self._requests.tell(FrontendRequest.RESET_DEVICE)
            elif self._requests.has(ProtocolFeature.STATUS):
                self._requests.tell(FrontendRequest.SET_STATUS, U64(0))
        self._rings.forget()
        self._replace_inflight()
        self._logging = False
        if self._channel is not None:
            self._channel.set_config_call(None)

    def _check_health(self) -> None:
        if self._requests.broken or NOW.wait({self.fileno(): 0}):
            raise self._fail(self._requests.broken or "the back-end closed the connection")

    def _close(self) -> None:
        with contextlib.suppress(ProtocolError, DeadlineExceeded):
            # so that the back-end makes its last writes to guest memory before the memory is gone
            self._stop_rings(drain=True)
        if self._channel is not None:
            self._channel.close()
        self._process.close()
        self._requests.close()

    def _give_up(self) -> bool:
        try:
            with contextlib.suppress(ProtocolError, DeadlineExceeded):
                self._stop_rings(drain=True)
            # a back-end that serves one front-end, as virtiofsd does, ends with its connection
            return not self._rings.started or self._process.hang_up(self.limit.left_s())
        finally:
            self._requests.broken = self._requests.broken or "it was given up"
            self._close()

    # --- device state ---

    def _set_state_fd(self, direction: StateDirection, phase: StatePhase, fd: int) -> int | None:
        try:
            with self._asking():
                self._transfer.abandon()
                return self._transfer.begin(direction, phase, fd)
        finally:
            discard([fd])

    @property
    def _keeps_what_is_abandoned(self) -> bool:
        # no message drops a load (`BackendState.abandon`)
        return True

    def _abandon_state(self) -> None:
        with self._asking():
            self._transfer.abandon()

    def _check_state(self) -> None:
        with self._asking():
            self._transfer.check()

    # --- dirty log and in-flight requests ---

    def _set_dirty_log(self, log: DirtyLog | None) -> None:
        before = self._logging
        with self._asking():
            if log is not None:
                self._requests.ask(FrontendRequest.SET_LOG_BASE, Log(log.size_bytes, log.offset), [log.fd])
            self._logging = log is not None
            try:
                self._set_features(self.accepted_features)
            except BaseException:
                self._logging = before
                raise
            self._rings.log(self.queues, logged=self._logging)

    def _get_inflight(self, queue_count: int, queue_size: int) -> InflightRegion:
        with self._asking():
            reply, fds = self._requests.ask_with_fds(
                FrontendRequest.GET_INFLIGHT_FD, Inflight(0, 0, queue_count, queue_size)
            )
        if not fds:
            why, request = "no descriptor came with it", FrontendRequest.GET_INFLIGHT_FD
            raise PeerRefused(request.name, peer=self.name, why=why, request=request)
        return InflightRegion(fds[0], reply.size_bytes, reply.offset, reply.queue_count, reply.queue_size)

    def _set_inflight(self, region: InflightRegion | None) -> None:
        if region is None:
            self._replace_inflight()
            return
        payload = Inflight(region.size_bytes, region.offset, region.queue_count, region.queue_size)
        # before the request, which may take effect although it raises
        before, self._inflight_size = self._inflight_size, (region.queue_count, region.queue_size)
        try:
            with self._asking():
                self._requests.tell(FrontendRequest.SET_INFLIGHT_FD, payload, [region.fd])
        except PeerRefused:
            self._inflight_size = before
            raise

    def _replace_inflight(self) -> None:
        """Have the back-end forget the requests in the region that it was given, and stop sharing it. No message takes
        a region away, so the back-end gets a fresh one, which no other process has."""
        if self._inflight_size is None:
            return
        region = self._get_inflight(*self._inflight_size)
        try:
            self._set_inflight(region)
        finally:
            os.close(region.fd)
        self._inflight_size = None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Mark the device as failed if its connection has become useless."""
        try:
            yield
        except ConnectionLost as error:
            raise self._fail(f"{error.what}: {error.why}") from error
        except (ProtocolError, DeadlineExceeded) as error:
            if self._requests.broken:
                self._fail(f"{error.what}: {error.why}")
            raise
