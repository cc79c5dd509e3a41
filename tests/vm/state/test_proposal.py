"""The requests of a proposal, from its header and a TOML file, on a kernel that has them: nothing of it is built in."""

from contextlib import ExitStack

import pytest

from vdpabridge.device import Capability
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.drivers.vhost_vdpa.proposal import state_requests
from vdpabridge.state.procedures import migrate

from ...support.mount import Mount
from ...support.state import load, state_of
from ...support.state_suite import busy, check_what_is_open, limits

HEADER = """
#include <linux/types.h>
#define VHOST_VIRTIO 0xAF
#define VHOST_BACKEND_F_DEVICE_STATE 0x3c
struct vhost_vdpa_device_state {
    __u32 direction;
#define VHOST_VDPA_DEVICE_STATE_LOAD 1
#define VHOST_VDPA_DEVICE_STATE_CANCEL 2
    __u32 phase;
    __s32 fd;
    __u32 flags;
};
#define VHOST_VDPA_SET_DEVICE_STATE_FD _IOWR(VHOST_VIRTIO, 0xE0, struct vhost_vdpa_device_state)
#define VHOST_VDPA_CHECK_DEVICE_STATE _IO(VHOST_VIRTIO, 0xE1)
"""
REQUEST = 'request = "VHOST_VDPA_SET_DEVICE_STATE_FD"\ndescriptor = "fd"\nfd = -1\n'
PROPOSAL = f"""
header = "proposal.h"
feature = "VHOST_BACKEND_F_DEVICE_STATE"
[save]
{REQUEST}
[load]
{REQUEST}direction = "VHOST_VDPA_DEVICE_STATE_LOAD"
[cancel]
{REQUEST}direction = "VHOST_VDPA_DEVICE_STATE_CANCEL"
[check]
request = "VHOST_VDPA_CHECK_DEVICE_STATE"
"""


@pytest.fixture
def requests(tmp_path):
    (tmp_path / "proposal.h").write_text(HEADER)
    (tmp_path / "proposal.toml").write_text(PROPOSAL)
    return state_requests(str(tmp_path / "proposal.toml"))


def test_it_carries_what_is_open(nodes, requests):
    with (
        VhostVdpa.open(nodes[0], timeout_s=30, state_requests=requests) as source,
        VhostVdpa.open(nodes[1], timeout_s=30, state_requests=requests) as destination,
        ExitStack() as stack,
    ):
        mount = busy(Mount(stack, source))
        destination.map([mount.memory.region])
        migrate(source, destination, limits())
        check_what_is_open(mount)


def test_its_bit_decides(block_node, nodes, requests):
    with VhostVdpa.open(block_node, state_requests=requests) as disk:
        assert Capability.DEVICE_STATE not in disk.capabilities
    with VhostVdpa.open(nodes[0], state_requests=requests) as device:
        assert Capability.DEVICE_STATE in device.capabilities
        load(device, state_of(device))
