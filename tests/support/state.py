"""Moving device state about, the way a front-end does."""

import os

from vdpabridge.device import StateDirection, StatePhase

from .transitions import begin_state


def state_of(device):
    """The state of a stopped ``device``."""
    with begin_state(device, StateDirection.SAVE) as file:
        state = file.read()
    device.check_state()
    return state


def load(device, state):
    """Load ``state``."""
    with begin_state(device, StateDirection.LOAD) as file:
        file.write(state)
    device.check_state()


def pump(source, destination):
    """State from ``source`` to ``destination`` through a pipe; both are checked."""
    reader, writer = os.pipe()
    source.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
    destination.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
    source.check_state()
    destination.check_state()
