"""Simulated file servers of a kernel with the proposal of device state."""

from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.drivers.vhost_vdpa.proposal import state_requests

from ...support.pair import bridged
from ..conftest import make_device

PARENT = "vdpasim_fs"
TAG = "vdpabridge"


@pytest.fixture(scope="session")
def nodes():
    """The nodes of simulated file servers with the same files and tag."""
    return [make_device(f"fs{number}", PARENT) for number in range(3)]


@contextmanager
def opened(kind, node):
    """A file server: ``kind`` is a driver, by itself or through a vhost-user socket."""
    with ExitStack() as stack:
        if kind.endswith("vhost-vdpa"):
            device = stack.enter_context(VhostVdpa.open(node, timeout_s=30, state_requests=state_requests()))
        else:
            device = stack.enter_context(Sim.fs(tag=TAG, timeout_s=30))
        yield stack.enter_context(bridged(device, timeout_s=30)) if "vhost-user" in kind else device
