"""The udev rules under a real systemd-udevd: hot-plug, cold-plug, links that come and go."""

import grp
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from vdpabridge.bus import Bus, udev_files
from vdpabridge.bus.netlink import VdpaNetlink

UDEVD = "/usr/lib/systemd/systemd-udevd"
RULES = Path("/etc/udev/rules.d/60-vdpabridge.rules")
HELPER = Path("/usr/lib/vdpabridge/vdpa-node")
LINKS = Path("/dev/vdpa/by-name")


def settle():
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)


@pytest.fixture(scope="module")
def installed():
    """The files that ``vdpabridge udev-rules`` prints, where their comments say."""
    HELPER.parent.mkdir(parents=True, exist_ok=True)
    RULES.write_text(udev_files.rules())
    HELPER.write_text(udev_files.helper())
    HELPER.chmod(0o755)


@pytest.fixture(scope="module")
def early(installed):
    """A device that is older than udev."""
    with VdpaNetlink() as netlink:
        netlink.add("early", "vdpasim_blk")
    device = Bus().bind("early", "vhost_vdpa")
    assert stat.S_IMODE(os.stat(device.node).st_mode) == 0o600
    return device


@pytest.fixture(scope="module")
def udevd(early):
    subprocess.run([UDEVD, "--daemon", "--resolve-names=late"], check=True)
    end = time.monotonic() + 20
    while subprocess.run(["udevadm", "control", "--ping"], capture_output=True, check=False).returncode:
        assert time.monotonic() < end, "systemd-udevd does not answer"
        time.sleep(0.1)
    yield
    subprocess.run(["udevadm", "control", "--exit"], check=True)
    shutil.rmtree("/dev/vdpa", ignore_errors=True)
    RULES.unlink()


def assert_given_to_kvm(node):
    status = os.stat(node)
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert grp.getgrgid(status.st_gid).gr_name == "kvm"


def test_the_rules_are_well_formed(installed):
    done = subprocess.run(["udevadm", "verify", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cold_plug(udevd, early):
    subprocess.run(["udevadm", "trigger", "--action=add", "--subsystem-match=vdpa"], check=True)
    settle()
    assert_given_to_kvm(early.node)
    assert os.readlink(LINKS / "early") == f"../../{os.path.basename(early.node)}"
    assert (LINKS / "early").resolve() == Path(early.node)
    with VdpaNetlink() as netlink:
        netlink.delete("early")


def test_hot_plug_unbind_and_removal(udevd):
    bus = Bus()
    with VdpaNetlink() as netlink:
        netlink.add("hot", "vdpasim_blk")
        settle()
        assert not (LINKS / "hot").is_symlink(), "bound to virtio_vdpa: there is no node to link to"
        node = bus.bind("hot", "vhost_vdpa").node
        settle()
        assert_given_to_kvm(node)
        assert (LINKS / "hot").resolve() == Path(node)
        bus.bind("hot", "virtio_vdpa")
        settle()
        assert not (LINKS / "hot").is_symlink()
        bus.bind("hot", "vhost_vdpa")
        settle()
        assert (LINKS / "hot").is_symlink()
        netlink.delete("hot")
        settle()
        assert not (LINKS / "hot").is_symlink()


def test_the_node_can_be_opened_by_group_kvm(udevd):
    with VdpaNetlink() as netlink:
        netlink.add("shared", "vdpasim_blk")
        node = Bus().bind("shared", "vhost_vdpa").node
        settle()
        kvm = grp.getgrnam("kvm").gr_gid
        script = (
            f"from vdpabridge.drivers.vhost_vdpa import VhostVdpa; print(VhostVdpa.open({node!r}).identity.device_id)"
        )

        def as_nobody(*groups):
            command = ["python3", "-c", script]
            return subprocess.run(
                command, user=65534, group=65534, extra_groups=groups, capture_output=True, text=True, check=False
            )

        allowed = as_nobody(kvm)
        assert (allowed.returncode, allowed.stdout) == (0, "2\n"), allowed.stderr
        refused = as_nobody()
        assert refused.returncode == 1
        assert f"{node}: open: EACCES: no permission" in refused.stderr.splitlines()[-1]
        netlink.delete("shared")


def test_a_name_with_a_space_touches_nobody_elses_link(udevd):
    """udev splits what a rule hands to a program at spaces."""
    bus = Bus()
    with VdpaNetlink() as netlink:
        netlink.add("plain", "vdpasim_blk")
        bus.bind("plain", "vhost_vdpa")
        # the kernel takes such names; iproute2 hands them on
        subprocess.run(["vdpa", "dev", "add", "name", "plain x", "mgmtdev", "vdpasim_blk"], check=True)
        bus.bind("plain x", "vhost_vdpa")
        settle()
        assert [name for name in os.listdir(LINKS) if name.startswith("plain")] == ["plain"]
        netlink.delete("plain x")
        settle()
        assert [name for name in os.listdir(LINKS) if name.startswith("plain")] == ["plain"]
        netlink.delete("plain")


def test_vduse_nodes(udevd):
    subprocess.run(["udevadm", "trigger", "--action=add", "--subsystem-match=vduse"], check=True)
    settle()
    assert_given_to_kvm("/dev/vduse/control")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", ".", "..", "", "a b", "$(id)"])
def test_the_helper_refuses_names_that_lead_astray(installed, name):
    done = subprocess.run([HELPER, "add", name, "/sys/devices/blk0"], capture_output=True, check=False)
    assert done.returncode == 1
    assert not LINKS.exists() or name not in os.listdir(LINKS)
