"""Moving device state about, the way a front-end does."""

import os

from vdpabridge.device import StateDirection, StatePhase

from .transitions import shared_file


def state_of(device):
    """The state of a stopped ``device``."""
    reader, writer = os.pipe()
    with open(reader, "rb") as file:
        assert device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer) is None
        state = file.read()
    device.check_state()
    return state


def load(device, state):
    """Load ``state``, out of a file."""
    with shared_file(0) as file:
        os.write(file, state)
        os.lseek(file, 0, os.SEEK_SET)
        assert device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, os.dup(file)) is None
        device.check_state()


def pump(source, destination):
    """State from ``source`` to ``destination`` through a pipe; both are checked."""
    reader, writer = os.pipe()
    source.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
    destination.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
    source.check_state()
    destination.check_state()
