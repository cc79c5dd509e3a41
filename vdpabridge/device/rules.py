"""Which operation is legal in which run state, what it needs, and where it leads: one table for every driver.

The same tests hold drivers and exporters to it; nothing else in the package decides what is legal.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import Enum

from ..errors import MissingCapability, StateError

__all__ = ["ALTERNATIVES", "RULES", "Capability", "Operation", "Rule", "RunState", "permit"]


class RunState(Enum):
    """What a device is doing, whatever the transport calls it."""

    RESET = "reset"
    """Nothing is negotiated; no queue exists."""
    CONFIGURED = "configured"
    """Features are accepted; queues may be set up; no request is processed."""
    RUNNING = "running"
    """Enabled queues are processed."""
    SUSPENDED = "suspended"
    """No queue is processed, guest memory is not touched, nobody is notified; everything is remembered."""
    FAILED = "failed"
    """The device gave up. Only a reset helps."""


class Capability(Enum):
    """What a device may or may not be able to do; discovered from feature bits only."""

    SUSPEND = "SUSPEND"
    RESUME = "RESUME"
    DEVICE_STATE = "DEVICE_STATE"
    CONFIG_WRITE = "CONFIG_WRITE"
    CONFIG_CALL = "CONFIG_CALL"
    ENABLE_WHILE_RUNNING = "ENABLE_WHILE_RUNNING"
    SETUP_WHILE_SUSPENDED = "SETUP_WHILE_SUSPENDED"
    QUEUE_CONTROL = "QUEUE_CONTROL"
    SKIP_DRAIN = "SKIP_DRAIN"
    DIRTY_LOG = "DIRTY_LOG"
    INFLIGHT = "INFLIGHT"
    STATE_RESET = "STATE_RESET"


#: What a caller can do if a capability is missing.
ALTERNATIVES: Mapping[Capability, str] = {
    Capability.SUSPEND: "only a reset stops this device, and it loses the queue positions: drain the queues first",
    Capability.RESUME: "vdpabridge.state.replay.resume() resets the device and sets it up again from where it was",
    Capability.DEVICE_STATE: "this device's internal state cannot be carried; move it only if it has none that matters",
    Capability.CONFIG_WRITE: "the configuration space of this device is read-only",
    Capability.CONFIG_CALL: "read the configuration space again from time to time",
    Capability.ENABLE_WHILE_RUNNING: "enable every queue before start()",
    Capability.SETUP_WHILE_SUSPENDED: "reset the device, or let vdpabridge.state.replay do so, and set it up again",
    Capability.QUEUE_CONTROL: "suspend the device: its queues start and stop together",
    Capability.SKIP_DRAIN: "let suspend() finish what the device has taken, which may take long",
    Capability.DIRTY_LOG: "treat all guest memory as written when the device is suspended",
    Capability.INFLIGHT: "suspend the device before its connection is given up",
    Capability.STATE_RESET: "a reset leaves the device's own state alone: connect to a fresh one",
}


class Operation(Enum):
    """The operations of `vdpabridge.device.Device`, in the words that errors use."""

    ACCEPT_FEATURES = "accept features"
    READ_CONFIG = "read the configuration space"
    WRITE_CONFIG = "write the configuration space"
    SET_CONFIG_CALL = "set the configuration change eventfd"
    MAP = "map memory"
    UNMAP = "unmap memory"
    SET_QUEUE = "set up a queue"
    SET_BASE = "set a queue's base"
    GET_BASE = "read a queue's base"
    SET_KICK = "set a kick eventfd"
    SET_CALL = "set a call eventfd"
    SET_ERR = "set an error eventfd"
    ENABLE_QUEUE = "enable or disable a queue"
    STOP_QUEUE = "stop a queue"
    START = "start"
    SUSPEND = "suspend"
    RESUME = "resume"
    RESET = "reset"
    SET_STATE_FD = "transfer device state"
    CHECK_STATE = "check the device state transfer"
    ABANDON_STATE = "abandon the device state transfer"
    SET_DIRTY_LOG = "set the dirty page log"
    GET_INFLIGHT = "get the in-flight region"
    SET_INFLIGHT = "set the in-flight region"


@dataclass(frozen=True)
class Rule:
    """When one operation is legal. ``leads`` maps each legal state to the state after success."""

    leads: Mapping[RunState, RunState]
    needs: Capability | None = None
    """Needed in every state."""
    needs_in: Mapping[RunState, Capability] = field(default_factory=dict)
    """Needed in that state in addition."""


_RESET, _CONFIGURED, _RUNNING, _SUSPENDED, _FAILED = RunState
_ALIVE = (_RESET, _CONFIGURED, _RUNNING, _SUSPENDED)
_STOPPED = (_RESET, _CONFIGURED, _SUSPENDED)


def _stays(*states: RunState) -> Mapping[RunState, RunState]:
    return {state: state for state in states}


_RECONFIGURE = {_SUSPENDED: Capability.SETUP_WHILE_SUSPENDED, _RUNNING: Capability.QUEUE_CONTROL}

RULES: Mapping[Operation, Rule] = {
    Operation.ACCEPT_FEATURES: Rule({_RESET: _CONFIGURED}),
    Operation.READ_CONFIG: Rule(_stays(*_ALIVE)),
    # not while suspended: the device promises not to change its configuration then
    Operation.WRITE_CONFIG: Rule(_stays(_CONFIGURED, _RUNNING), Capability.CONFIG_WRITE),
    Operation.SET_CONFIG_CALL: Rule(_stays(_CONFIGURED, _RUNNING, _SUSPENDED), Capability.CONFIG_CALL),
    Operation.MAP: Rule(_stays(*_ALIVE)),
    Operation.UNMAP: Rule(_stays(*_ALIVE)),
    # on a running device, only for a queue that was not set up yet, or was stopped
    Operation.SET_QUEUE: Rule(_stays(_CONFIGURED, _RUNNING, _SUSPENDED), needs_in=_RECONFIGURE),
    Operation.SET_BASE: Rule(_stays(_CONFIGURED, _RUNNING, _SUSPENDED), needs_in=_RECONFIGURE),
    # not while running: what a running device answers is a guess (depending on the device: racy, stale or refused)
    Operation.GET_BASE: Rule(_stays(_CONFIGURED, _SUSPENDED)),
    Operation.SET_KICK: Rule(_stays(_CONFIGURED, _RUNNING, _SUSPENDED)),
    Operation.SET_CALL: Rule(_stays(_CONFIGURED, _RUNNING, _SUSPENDED)),
    Operation.SET_ERR: Rule(_stays(_CONFIGURED, _RUNNING, _SUSPENDED)),
    Operation.ENABLE_QUEUE: Rule(
        _stays(_CONFIGURED, _RUNNING, _SUSPENDED),
        needs_in={_RUNNING: Capability.ENABLE_WHILE_RUNNING, _SUSPENDED: Capability.SETUP_WHILE_SUSPENDED},
    ),
    Operation.STOP_QUEUE: Rule(_stays(_RUNNING), Capability.QUEUE_CONTROL),
    Operation.START: Rule({_CONFIGURED: _RUNNING}),
    # VHOST_VDPA_SUSPEND answers 0 and does nothing before DRIVER_OK: here that is an error
    Operation.SUSPEND: Rule({_RUNNING: _SUSPENDED, _SUSPENDED: _SUSPENDED}, Capability.SUSPEND),
    Operation.RESUME: Rule({_SUSPENDED: _RUNNING}, Capability.RESUME),
    Operation.RESET: Rule(dict.fromkeys(RunState, _RESET)),
    # a device that was never started counts as stopped: QEMU and Cloud Hypervisor load before anything else
    Operation.SET_STATE_FD: Rule(_stays(*_STOPPED), Capability.DEVICE_STATE),
    Operation.CHECK_STATE: Rule(_stays(*_STOPPED), Capability.DEVICE_STATE),
    Operation.ABANDON_STATE: Rule(_stays(*_STOPPED), Capability.DEVICE_STATE),
    Operation.SET_DIRTY_LOG: Rule(_stays(_CONFIGURED, _RUNNING, _SUSPENDED), Capability.DIRTY_LOG),
    Operation.GET_INFLIGHT: Rule(_stays(*_STOPPED), Capability.INFLIGHT),
    Operation.SET_INFLIGHT: Rule(_stays(*_STOPPED), Capability.INFLIGHT),
}


def permit(device: str, operation: Operation, state: RunState, capabilities: Set[Capability]) -> RunState:
    """The state that ``operation`` leads to from ``state``.

    Raises `StateError` if it is not legal there, `MissingCapability` if the device cannot do it at all.
    """
    rule = RULES[operation]
    if rule.needs is not None and rule.needs not in capabilities:
        raise MissingCapability(device, operation.value, rule.needs.value, ALTERNATIVES[rule.needs])
    after = rule.leads.get(state)
    if after is None:
        legal = tuple(legal_state.value for legal_state in rule.leads)
        raise StateError(device, operation.value, state.value, legal)
    if state in rule.needs_in and (needed := rule.needs_in[state]) not in capabilities:
        raise MissingCapability(device, f"{operation.value} while {state.value}", needed.value, ALTERNATIVES[needed])
    return after
