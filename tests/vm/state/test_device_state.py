"""What device state promises, of the kernel: the same tests as for the simulator in this process."""

from contextlib import ExitStack

import pytest

from ...support.state_suite import *  # noqa: F403
from ...support.state_suite import at_work, saved  # noqa: F401
from .conftest import opened

#: The drivers of the first file server that a test opens, and of the others.
PAIRS = {
    "vhost-vdpa": ("vhost-vdpa",),
    "vhost-user over vhost-vdpa": ("vhost-user over vhost-vdpa",),
    "vhost-vdpa to vhost-user": ("vhost-vdpa", "vhost-user over vhost-vdpa"),
    "vhost-user to vhost-vdpa": ("vhost-user over vhost-vdpa", "vhost-vdpa"),
    "vhost-vdpa to sim": ("vhost-vdpa", "sim"),
    "sim to vhost-vdpa": ("sim", "vhost-vdpa"),
}


@pytest.fixture(params=PAIRS)
def file_server(request, nodes):
    """A function that opens one more file server."""
    kinds = PAIRS[request.param]
    with ExitStack() as stack:
        count = 0

        def one_more():
            nonlocal count
            kind = kinds[min(count, len(kinds) - 1)]
            count += 1
            return stack.enter_context(opened(kind, nodes[count - 1]))

        yield one_more
