"""What device state promises, of the simulator: itself, and through a vhost-user socket."""

from contextlib import ExitStack

import pytest

from vdpabridge.drivers.sim import Sim

from ..support.pair import bridged
from ..support.state_suite import *  # noqa: F403
from ..support.state_suite import at_work, saved  # noqa: F401


@pytest.fixture(params=["sim", "vhost-user over sim"])
def file_server(request):
    """A function that opens one more file server."""
    with ExitStack() as stack:

        def one_more():
            device = stack.enter_context(Sim.fs(timeout_s=10))
            return stack.enter_context(bridged(device, timeout_s=10)) if "vhost-user" in request.param else device

        yield one_more
