"""Every way to ask for the wrong thing: one line that says device, what, why and what to do."""

import errno
import os
import subprocess
import sys

import pytest

from vdpabridge.device import RunState
from vdpabridge.drivers.vhost_vdpa import NodeError, VhostVdpa
from vdpabridge.errors import FeatureError, KernelError

ROWS = [
    ("/dev/vhost-vdpa-99", errno.ENOENT, "no such node", "vdpabridge list"),
    ("/dev/null", errno.ENOTTY, "not a vhost-vdpa node", "vdpabridge list"),
    ("/etc/passwd", errno.ENOTTY, "not a vhost-vdpa node", "vdpabridge list"),
    ("/dev", errno.ENOTTY, "not a vhost-vdpa node", "vdpabridge list"),
    ("/dev/vhost-net", errno.ENOTTY, "not a vhost-vdpa node", "vdpabridge list"),
    ("/dev/vduse/control", errno.ENOTTY, "not a vhost-vdpa node", "vdpabridge list"),
]


@pytest.mark.parametrize(("path", "code", "why", "hint"), ROWS, ids=[row[0] for row in ROWS])
def test_wrong_nodes(path, code, why, hint):
    with pytest.raises(NodeError) as caught:
        VhostVdpa.open(path)
    assert caught.value.errno == code
    text = str(caught.value)
    assert text.startswith(f"{path}: open: {errno.errorcode[code]}: {why} (")
    assert hint in text
    assert "\n" not in text


def test_a_stale_node():
    os.mknod("/dev/stale", 0o600 | 0o020000, os.makedev(99, 99))
    try:
        with pytest.raises(NodeError, match="stale") as caught:
            VhostVdpa.open("/dev/stale")
        assert caught.value.errno == errno.ENXIO
    finally:
        os.unlink("/dev/stale")


def test_no_permission(block_node):
    script = f"from vdpabridge.drivers.vhost_vdpa import VhostVdpa; VhostVdpa.open({block_node!r})"
    done = subprocess.run([sys.executable, "-c", script], user=65534, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.endswith(
        f"{block_node}: open: EACCES: no permission "
        "(be root, or be in group kvm with the rules of 'vdpabridge udev-rules' installed)"
    )


def test_features_that_are_not_offered(bench):
    with pytest.raises(FeatureError, match=r"bits 0x10 are not offered") as caught:
        bench.device.accept_features(1 << 32 | 1 << 4)
    assert caught.value.features == 1 << 4
    assert bench.device.state.value == "reset"


@pytest.mark.parametrize(("offset", "size"), [(96, 1), (0, 97), (-1, 1), (0, 0)])
def test_outside_the_configuration_space(bench, offset, size):
    with pytest.raises(ValueError, match="outside the configuration space"):
        bench.device.read_config(offset, size)


def test_no_such_queue(bench):
    bench.device.accept_features(bench.features)
    with pytest.raises(ValueError, match="no queue 1: the device has 1"):
        bench.device.get_base(1)


def test_kernel_refusals_say_queue_and_reason(bench):
    bench.device.accept_features(bench.features)
    with pytest.raises(KernelError) as caught:
        bench.device.set_kick(0, bench.device.fileno())
    error = caught.value
    assert (error.errno, error.request, error.queue) == (errno.EINVAL, "VHOST_SET_VRING_KICK", 0)
    assert (
        str(error)
        == f"{bench.device.name}: VHOST_SET_VRING_KICK queue 0: EINVAL: the descriptor is not an eventfd (pass an eventfd)"
    )
    assert bench.device.queues == {}


def test_a_deadline_changes_nothing_for_a_device_that_answers(bench):
    bench.device.timeout_s = 5.0
    bench.reach(RunState.SUSPENDED)
    bench.device.reset()
    assert bench.device.state is RunState.RESET
