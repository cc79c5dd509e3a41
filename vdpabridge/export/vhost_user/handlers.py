"""Handles the requests of a front-end: one method for each, by the table at the end.

A method gets the decoded payload and owns the descriptors in ``fds``; the caller closes those that it leaves there. It
returns the payload of the reply, if the request has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ...abi.vhost import VHOST_F_LOG_ALL
from ...abi.vhost_user import (
    CONFIG_SIZE_MAX,
    DEVICE_STATE_NO_FD,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    BackendRequest,
    ConfigFlags,
    FrontendRequest,
    ProtocolFeature,
)
from ...abi.vhost_user_payloads import U64, Config, DeviceStateTransfer, Inflight, VringState
from ...device import Capability, Device, DirtyLog, InflightRegion, Operation, RunState
from ...errors import VdpaBridgeError
from ...linux.descriptors import stop_receiving
from ...linux.eventfds import clear
from ...state.replay import start_over
from ...vhost_user.connection import Connection
from .admission import admit
from .frontend_memory import FrontendMemory
from .frontend_rings import FrontendRings
from .frontend_state import FrontendState
from .offer import MEMORY_SLOTS, features_of, protocol_features_of
from .switches import InflightSwitch, LogSwitch

__all__ = ["HANDLERS", "Answer", "Handlers"]

_LOG_ALL = 1 << VHOST_F_LOG_ALL
_PROTOCOL_FEATURES = 1 << VHOST_USER_F_PROTOCOL_FEATURES
#: The low byte is the error; with "no descriptor" set beside it every front-end sees that none comes.
_STATE_REFUSED = DEVICE_STATE_NO_FD | 1
#: How long a front-end may take to accept an announcement; its socket has room for hundreds.
_ANNOUNCEMENT_S = 0.5


class Answer:
    """A reply: its payload, and the descriptors to send with it, which the sender closes afterwards."""

    __slots__ = ("error", "fds", "payload")

    def __init__(self, payload: Any, fds: tuple[int, ...] = (), error: Exception | None = None) -> None:
        self.payload = payload
        self.fds = fds
        self.error = error
        """The error, for the log; the reply has only a number."""


class Handlers:
    """One front-end's use of ``device``, which is borrowed."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memory = FrontendMemory(device)
        self.rings = FrontendRings(device, self.memory, self._prepare)
        self.protocol_features = 0
        self._offered = features_of(device)
        self.channel: Connection | None = None
        """For the back-end's requests to the front-end."""
        self._log = LogSwitch(device)
        self._inflight = InflightSwitch(device)
        self._transfer = FrontendState(device)
        self._features_set = False
        self._inflight_set = False
        self._change_kept = False
        if device.state is RunState.FAILED:
            # it failed with the last front-end; that does not concern this one
            device.reset()
        # also the last front-end's memory, if it could not be unmapped when that one left
        self.memory.clear()
        if device.inflight is not None:
            device.set_inflight(None)
        self.config_changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Signalled when the device's configuration has changed."""

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether the front-end has negotiated ``feature``."""
        return bool(self.protocol_features >> feature & 1)

    def perform(self, request: FrontendRequest, payload: Any, fds: list[int]) -> Answer | None:
        """Do what ``request`` asks for. Raises `VdpaBridgeError`, ValueError, OSError as the device does."""
        admit(request, fds)
        return HANDLERS[request](self, payload, fds)

    # --- features ---

    def get_features(self, _payload: Any, _fds: list[int]) -> Answer:
        """Legal at any time: QEMU uses it as a barrier."""
        return Answer(U64(self._offered))

    def set_features(self, payload: U64, _fds: list[int]) -> None:
        """Accept features, and switch the dirty log. A change of the device's features needs a reset."""
        if unknown := payload.value & ~self._offered:
            raise VdpaBridgeError("SET_FEATURES", why=f"bits {unknown:#x} were not offered")
        self._accept_features(payload.value & ~(_LOG_ALL | _PROTOCOL_FEATURES))
        self._features_set = True
        if Capability.CONFIG_CALL in self.device.capabilities:
            self.device.set_config_call(self.config_changed)
        self._log.set_wanted(bool(payload.value & _LOG_ALL))
        # with the bit, each ring keeps its own enable state
        if not payload.value & _PROTOCOL_FEATURES:
            self.rings.enable_all()
        self.rings.go_on()

    def _accept_features(self, wanted: int) -> None:
        device = self.device
        if device.state is RunState.FAILED:
            if self.rings.lost:
                # a front-end that wants it reset, and everything forgotten, sends RESET_DEVICE
                device.check_health()
            device.reset()
            self._transfer.forget()
            self.rings.leave_device()
        if device.state is not RunState.RESET and device.accepted_features != wanted:
            if device.state is RunState.RUNNING:
                raise VdpaBridgeError("SET_FEATURES", why="the device runs with other features")
            self._accept_others(wanted)
        if device.state is RunState.RESET:
            device.accept_features(wanted)
        self.rings.features = wanted

    def _accept_others(self, wanted: int) -> None:
        """Accept other features, which needs a reset. All else stays: the device's own state, which may have been
        loaded, and what the front-end has said already."""
        self.rings.settle()
        loaded = self._transfer.loaded
        start_over(self.device, lambda: self.device.accept_features(wanted), start=False, keep=False)
        self._transfer.forget()
        self._transfer.loaded = loaded
        self.rings.leave_device()

    def get_protocol_features(self, _payload: Any, _fds: list[int]) -> Answer:
        """Legal before SET_FEATURES."""
        return Answer(U64(protocol_features_of(self.device)))

    def set_protocol_features(self, payload: U64, _fds: list[int]) -> None:
        """Legal without GET_PROTOCOL_FEATURES: Cloud Hypervisor does not send that when it restores."""
        if unknown := payload.value & ~protocol_features_of(self.device):
            raise VdpaBridgeError("SET_PROTOCOL_FEATURES", why=f"bits {unknown:#x} were not offered")
        self.protocol_features = payload.value

    def set_owner(self, _payload: Any, _fds: list[int]) -> None:
        """The connection is the owner."""

    def reset_owner(self, _payload: Any, _fds: list[int]) -> None:
        """Deprecated; the specification lets us ignore it."""

    def reset_device(self, _payload: Any, _fds: list[int]) -> None:
        """The guest's driver has reset its device."""
        self._reset()

    def get_queue_num(self, _payload: Any, _fds: list[int]) -> Answer:
        """How many queues there are."""
        return Answer(U64(self.device.identity.queue_count))

    def _reset(self) -> None:
        self.device.reset()
        self._forget()

    def _forget(self) -> None:
        self._features_set = False
        self._inflight.forget()
        self._transfer.forget()
        self.rings.forget()

    # --- configuration space ---

    def get_config(self, payload: Config, _fds: list[int]) -> Answer:
        """Reads beyond the end are zeros: front-ends ask for the newest structure, whatever the device has."""
        if payload.size_bytes > CONFIG_SIZE_MAX or len(payload.data) != payload.size_bytes:
            why = f"{payload.size_bytes} bytes asked for, and room for {len(payload.data)}"
            raise VdpaBridgeError("GET_CONFIG", why=why)
        whole = self.device.identity.config_size_bytes
        here = max(0, min(payload.size_bytes, whole - payload.offset))
        try:
            data = self.device.read_config(payload.offset, here) if here else b""
        except VdpaBridgeError as error:
            return Answer(Config(payload.offset, 0, payload.flags, b""), error=error)
        data = data.ljust(payload.size_bytes, b"\0")
        return Answer(Config(payload.offset, payload.size_bytes, payload.flags, data))

    def set_config(self, payload: Config, _fds: list[int]) -> None:
        """Write what a guest may write. No device here accepts what only a migration may write."""
        if payload.flags != ConfigFlags.GUEST_WRITE:
            raise VdpaBridgeError("SET_CONFIG", why=f"flags {payload.flags:#x}: read-only fields stay as they are")
        self.device.write_config(payload.offset, payload.data)

    def set_backend_req_fd(self, _payload: Any, fds: list[int]) -> None:
        """Take the channel for the back-end's requests, none of which asks for an answer."""
        channel = Connection.from_fd(fds.pop(), timeout_s=_ANNOUNCEMENT_S)
        stop_receiving(channel.fileno())
        if self.channel is not None:
            self.channel.close()
        self.channel = channel

    def announce_config_change(self) -> None:
        """Pass the device's notification on to the front-end. If the device is suspended, do so when it resumes: until
        then the front-end must not be told anything ("Suspended device state"). This does not apply to a device that
        was never started: its front-end may have read the configuration already.

        Raises `VdpaBridgeError` if the front-end does not take it; the front-end gets no more of these then.
        """
        clear(self.config_changed)
        self._change_kept = self.device.state is RunState.SUSPENDED
        if self._change_kept:
            return
        if self.channel is not None and self.has(ProtocolFeature.CONFIG):
            try:
                self.channel.send(BackendRequest.CONFIG_CHANGE_MSG)
            except VdpaBridgeError:
                self.channel.close()
                self.channel = None
                raise

    def announce_kept_change(self) -> None:
        """Pass on a change that came while the device was suspended, if it is not suspended any more. Raises as
        `announce_config_change`."""
        if self._change_kept and self.device.state is not RunState.SUSPENDED:
            self.announce_config_change()

    # --- memory ---

    def set_mem_table(self, payload: Any, fds: list[int]) -> None:
        """Replace all regions. The device pauses if a ring at work loses its memory."""
        if self.rings.lie_in(self.memory.lost_by(payload.regions, fds)):
            self.rings.suspend()
        try:
            self.memory.replace(payload.regions, fds)
        finally:
            self.rings.go_on()

    def get_max_mem_slots(self, _payload: Any, _fds: list[int]) -> Answer:
        """How many regions there can be."""
        return Answer(U64(MEMORY_SLOTS))

    def add_mem_reg(self, payload: Any, fds: list[int]) -> None:
        """Add one region."""
        self.memory.add(payload.region, fds[0])
        self.rings.go_on()

    def rem_mem_reg(self, payload: Any, _fds: list[int]) -> None:
        """Remove one region. A descriptor may come with it, and is closed. Rings in it pause until it comes again."""
        if self.rings.lie_in([payload.region]):
            self.rings.suspend()
        try:
            self.memory.remove(payload.region)
        finally:
            self.rings.go_on()

    # --- rings ---

    def set_vring_num(self, payload: VringState, _fds: list[int]) -> None:
        """Set a ring's size."""
        self.rings.set_size(payload.index, payload.num)

    def set_vring_addr(self, payload: Any, _fds: list[int]) -> None:
        """Set a ring's addresses. If a log is kept, it has the used ring whatever the flag says: never too little."""
        self.rings.set_address(payload.index, payload)

    def set_vring_base(self, payload: VringState, _fds: list[int]) -> None:
        """Set a ring's position."""
        self.rings.set_base(payload.index, payload.num)

    def get_vring_base(self, payload: VringState, _fds: list[int]) -> Answer:
        """Stop a ring, after the device has finished all requests that it took."""
        return Answer(VringState(payload.index, self.rings.stop(payload.index, drain=True)))

    def get_vring_base_skip_drain(self, payload: VringState, _fds: list[int]) -> Answer:
        """Stop a ring, and leave the requests that the device took to the in-flight region."""
        return Answer(VringState(payload.index, self.rings.stop(payload.index, drain=False)))

    def set_vring_kick(self, payload: U64, fds: list[int]) -> None:
        """Start a ring."""
        if payload.value & VRING_NO_FD:
            raise VdpaBridgeError("SET_VRING_KICK", why="the device does not poll: it needs a descriptor")
        self._set_eventfd(Operation.SET_KICK, payload, fds)

    def set_vring_call(self, payload: U64, fds: list[int]) -> None:
        """Set the eventfd that signals used buffers."""
        self._set_eventfd(Operation.SET_CALL, payload, fds)

    def set_vring_err(self, payload: U64, fds: list[int]) -> None:
        """Set the eventfd that signals errors."""
        self._set_eventfd(Operation.SET_ERR, payload, fds)

    def set_vring_enable(self, payload: VringState, _fds: list[int]) -> None:
        """Enable or disable a ring."""
        if payload.num > 1:
            raise VdpaBridgeError("SET_VRING_ENABLE", why=f"{payload.num} is neither 0 nor 1")
        self.rings.enable(payload.index, bool(payload.num))

    def _set_eventfd(self, operation: Operation, payload: U64, fds: list[int]) -> None:
        if bool(fds) == bool(payload.value & VRING_NO_FD) or payload.value & ~(VRING_INDEX_MASK | VRING_NO_FD):
            raise VdpaBridgeError(operation.value, why=f"{len(fds)} descriptors with {payload.value:#x}")
        self.rings.set_eventfd(operation, payload.value & VRING_INDEX_MASK, fds.pop() if fds else None)

    # --- dirty log and in-flight requests ---

    def set_log_base(self, payload: Any, fds: list[int]) -> Answer:
        """Set the log's place. The reply is the payload: rust-vmm waits for all of its 16 bytes, others for any."""
        self._log.set_place(DirtyLog(fds.pop(), payload.size_bytes, payload.offset))
        return Answer(payload)

    def set_log_fd(self, _payload: Any, _fds: list[int]) -> None:
        """Ignore the eventfd that would signal changes of the log: nobody waits for it."""

    def get_inflight_fd(self, payload: Inflight, _fds: list[int]) -> Answer:
        """Make a region for requests in flight."""
        region = self.device.get_inflight(payload.queue_count, payload.queue_size)
        reply = Inflight(region.size_bytes, region.offset, region.queue_count, region.queue_size)
        return Answer(reply, (region.fd,))

    def set_inflight_fd(self, payload: Inflight, fds: list[int]) -> None:
        """Use a region that holds, or will hold, requests in flight."""
        region = InflightRegion(fds[0], payload.size_bytes, payload.offset, payload.queue_count, payload.queue_size)
        self._inflight.set_region(region)

    def _prepare(self) -> None:
        """Before rings are set up: give the device the log, the in-flight region and the eventfd that it is to have."""
        self._log.apply()
        self._inflight.apply()
        if (
            self._features_set
            and self.device.config_call is None
            and Capability.CONFIG_CALL in self.device.capabilities
        ):
            self.device.set_config_call(self.config_changed)

    # --- device state ---

    def set_device_state_fd(self, payload: DeviceStateTransfer, fds: list[int]) -> Answer:
        """Begin a transfer: the device gets the descriptor, or the reply has another one to use instead."""
        try:
            # checked first: an invalid request must not reset the device
            kind = self._transfer.check_kind(payload.direction, payload.phase)
            if self._transfer.needs_fresh_device(kind, features_set=self._features_set):
                self._reset()
            instead = self._transfer.begin(kind, fds.pop())
        except (VdpaBridgeError, ValueError, OSError) as error:
            return Answer(U64(_STATE_REFUSED), error=error)
        return Answer(U64(DEVICE_STATE_NO_FD)) if instead is None else Answer(U64(0), (instead,))

    def check_device_state(self, _payload: Any, _fds: list[int]) -> Answer:
        """Wait for the end of the transfer."""
        try:
            self._transfer.check()
        except VdpaBridgeError as error:
            return Answer(U64(1), error=error)
        return Answer(U64(0))

    # --- the end ---

    def close(self) -> list[Exception]:
        """The front-end is gone: stop the device, which remembers everything, and drop what was the front-end's.

        Returns what went wrong; each step is done even if an earlier one failed.
        """
        problems: list[Exception] = []
        for step in (
            self._stop,
            self._transfer.abandon,
            self._log.close,
            self._hear_no_more,
            self._inflight.close,
            self.memory.clear,
        ):
            try:
                step()
            except (VdpaBridgeError, ValueError, OSError) as error:
                problems.append(error)
        self.rings.close()
        if self.channel is not None:
            self.channel.close()
        os.close(self.config_changed)
        return problems

    def _stop(self) -> None:
        """Stop all work in the memory of a guest that is gone: a device that does not suspend is reset."""
        try:
            self.rings.suspend()
        except (VdpaBridgeError, OSError):
            self.device.reset()
            raise
        if self.device.state is RunState.FAILED:
            self.device.reset()

    def _hear_no_more(self) -> None:
        if self.device.config_call is not None:
            self.device.set_config_call(None)


#: Every request that is handled; the payload and descriptors of each are in `vdpabridge.abi.vhost_user_table`.
HANDLERS: Mapping[FrontendRequest, Callable[[Handlers, Any, list[int]], Answer | None]] = {
    FrontendRequest.GET_FEATURES: Handlers.get_features,
    FrontendRequest.SET_FEATURES: Handlers.set_features,
    FrontendRequest.GET_PROTOCOL_FEATURES: Handlers.get_protocol_features,
    FrontendRequest.SET_PROTOCOL_FEATURES: Handlers.set_protocol_features,
    FrontendRequest.SET_OWNER: Handlers.set_owner,
    FrontendRequest.RESET_OWNER: Handlers.reset_owner,
    FrontendRequest.RESET_DEVICE: Handlers.reset_device,
    FrontendRequest.GET_QUEUE_NUM: Handlers.get_queue_num,
    FrontendRequest.GET_CONFIG: Handlers.get_config,
    FrontendRequest.SET_CONFIG: Handlers.set_config,
    FrontendRequest.SET_BACKEND_REQ_FD: Handlers.set_backend_req_fd,
    FrontendRequest.SET_MEM_TABLE: Handlers.set_mem_table,
    FrontendRequest.GET_MAX_MEM_SLOTS: Handlers.get_max_mem_slots,
    FrontendRequest.ADD_MEM_REG: Handlers.add_mem_reg,
    FrontendRequest.REM_MEM_REG: Handlers.rem_mem_reg,
    FrontendRequest.SET_VRING_NUM: Handlers.set_vring_num,
    FrontendRequest.SET_VRING_ADDR: Handlers.set_vring_addr,
    FrontendRequest.SET_VRING_BASE: Handlers.set_vring_base,
    FrontendRequest.GET_VRING_BASE: Handlers.get_vring_base,
    FrontendRequest.GET_VRING_BASE_SKIP_DRAIN: Handlers.get_vring_base_skip_drain,
    FrontendRequest.SET_VRING_KICK: Handlers.set_vring_kick,
    FrontendRequest.SET_VRING_CALL: Handlers.set_vring_call,
    FrontendRequest.SET_VRING_ERR: Handlers.set_vring_err,
    FrontendRequest.SET_VRING_ENABLE: Handlers.set_vring_enable,
    FrontendRequest.SET_LOG_BASE: Handlers.set_log_base,
    FrontendRequest.SET_LOG_FD: Handlers.set_log_fd,
    FrontendRequest.GET_INFLIGHT_FD: Handlers.get_inflight_fd,
    FrontendRequest.SET_INFLIGHT_FD: Handlers.set_inflight_fd,
    FrontendRequest.SET_DEVICE_STATE_FD: Handlers.set_device_state_fd,
    FrontendRequest.CHECK_DEVICE_STATE: Handlers.check_device_state,
}
