"""The state table as a test: every operation tried in every run state, the same for every driver.

A driver's test gives a `Bench` that can bring a device to each run state it can reach.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from vdpabridge.device import (
    Capability,
    Device,
    DirtyLog,
    InflightRegion,
    MemoryRegion,
    Operation,
    RunState,
    SplitBase,
    StateDirection,
    StatePhase,
)
from vdpabridge.device.rules import RULES
from vdpabridge.errors import DeviceFailed, MissingCapability, StateError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

#: Everything but FAILED, which a device reaches by its own doing.
PAIRS = [(operation, state) for operation in Operation for state in RunState if state is not RunState.FAILED]


@dataclass
class Bench:
    """A device with the memory and the ring it works on."""

    device: Device
    memory: GuestMemory
    queue: SplitQueue
    features: int

    def reach(self, state):
        """Bring the device from reset to ``state``; skips where it cannot get there at all."""
        device = self.device
        if state is RunState.RESET:
            return
        device.accept_features(self.features)
        self.queue.attach(device, 0, self.queue.avail_index)
        if state is RunState.CONFIGURED:
            return
        device.start()
        if state is RunState.RUNNING:
            return
        if Capability.SUSPEND not in device.capabilities:
            pytest.skip(f"{device.name} cannot suspend")
        device.suspend()

    def perform(self, operation):
        """Call the device's method for ``operation`` with arguments that are right in themselves."""
        device = self.device
        extra = MemoryRegion(0x8000_0000, 4096, self.memory.fileno())
        # queue 0 is being processed then
        spare = 1 if device.state is RunState.RUNNING else 0
        with eventfd() as event, shared_file(1 << 20) as file:
            match operation:
                case Operation.ACCEPT_FEATURES:
                    device.accept_features(self.features)
                case Operation.READ_CONFIG:
                    device.read_config(0, 8)
                case Operation.WRITE_CONFIG:
                    device.write_config(32, b"\1")
                case Operation.SET_CONFIG_CALL:
                    device.set_config_call(event)
                case Operation.MAP:
                    device.map([extra])
                    device.unmap([extra])
                case Operation.UNMAP if device.state is RunState.RUNNING:
                    # not the memory of the rings: a device that still looks after an earlier kick may miss it
                    device.map([extra])
                    device.unmap([extra])
                case Operation.UNMAP:
                    device.unmap([self.memory.region])
                    device.map([self.memory.region])
                case Operation.SET_QUEUE:
                    device.set_queue(spare, self.queue.setup)
                case Operation.SET_BASE:
                    device.set_base(spare, SplitBase(0))
                case Operation.GET_BASE:
                    device.get_base(0)
                case Operation.SET_KICK:
                    device.set_kick(0, self.queue.kick_fd)
                case Operation.SET_CALL:
                    device.set_call(0, self.queue.call_fd)
                case Operation.SET_ERR:
                    device.set_err(0, event)
                case Operation.ENABLE_QUEUE:
                    device.enable_queue(0)
                case Operation.STOP_QUEUE:
                    device.stop_queue(0)
                case Operation.SET_STATE_FD:
                    begin_state(device, StateDirection.SAVE).close()
                case Operation.SET_DIRTY_LOG:
                    device.set_dirty_log(DirtyLog(file, 1 << 20))
                case Operation.GET_INFLIGHT:
                    os.close(device.get_inflight(1, 64).fd)
                case Operation.SET_INFLIGHT:
                    device.set_inflight(InflightRegion(file, 1 << 16, 0, 1, self.queue.size))
                case Operation.CHECK_STATE:
                    if Capability.DEVICE_STATE in device.capabilities and device.state is not RunState.RUNNING:
                        with begin_state(device, StateDirection.SAVE) as state:
                            state.read()
                    device.check_state()
                case _:
                    getattr(device, operation.name.lower())()


def begin_state(device, direction):
    """A transfer begun through a pipe, or through the device's own channel: the other end, as a file."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    theirs, ours = (writer, reader) if direction is StateDirection.SAVE else (reader, writer)
    try:
        instead = device.set_state_fd(direction, StatePhase.STOPPED, theirs)
    except BaseException:
        os.close(ours)
        raise
    if instead is not None:
        os.close(ours)
    return open(ours if instead is None else instead, "rb" if direction is StateDirection.SAVE else "wb")


def expected(device, operation, state):
    """The error that the table foresees, or the state that it leads to."""
    rule = RULES[operation]
    if rule.needs is not None and rule.needs not in device.capabilities:
        return MissingCapability
    if state not in rule.leads:
        return StateError
    if state in rule.needs_in and rule.needs_in[state] not in device.capabilities:
        return MissingCapability
    return rule.leads[state]


def check_pair(bench, operation, state):
    """Try ``operation`` in ``state`` and hold the outcome against the table."""
    bench.reach(state)
    outcome = expected(bench.device, operation, state)
    if isinstance(outcome, RunState):
        bench.perform(operation)
        assert bench.device.state is outcome
        return
    with pytest.raises(outcome) as caught:
        bench.perform(operation)
    assert not isinstance(caught.value, DeviceFailed)
    assert caught.value.operation.startswith(operation.value)
    assert bench.device.state is state


@contextmanager
def eventfd():
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def shared_file(size_bytes):
    fd = os.memfd_create("vdpabridge-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    try:
        yield fd
    finally:
        os.close(fd)
