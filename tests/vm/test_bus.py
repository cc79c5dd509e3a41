"""The bus on a real kernel: names and nodes, binding, making and deleting, who is in the way, events."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vdpabridge.bus import Bus, BusError, DeviceBusy, NoSuchDevice
from vdpabridge.bus.events import BusEvent, BusEvents
from vdpabridge.bus.netlink import VdpaNetlink
from vdpabridge.drivers.vhost_vdpa import NodeError, VhostVdpa
from vdpabridge.errors import VdpaBridgeError

from ..support.waiting import wait_until
from .conftest import running_disk


def vdpabridge(*words, check=True):
    done = subprocess.run([sys.executable, "-m", "vdpabridge", *words], capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def netlink():
    with VdpaNetlink() as connection:
        yield connection


@pytest.fixture
def passing(netlink):
    """A device that is there for one test, bound to vhost_vdpa."""
    netlink.add("passing", "vdpasim_blk")
    yield Bus().bind("passing", "vhost_vdpa")
    if any(device.name == "passing" for device in netlink.devices()):
        netlink.delete("passing")


def test_management_devices(netlink):
    parents = {parent.handle: parent for parent in netlink.management_devices()}
    assert parents["vdpasim_blk"].classes == (2,)
    assert parents["vdpasim_net"].classes == (1,)
    assert parents["vdpasim_net"].max_queues == 3


def test_a_device_is_described(netlink, block_node):
    device = next(device for device in netlink.devices() if device.name == "blk0")
    assert (device.device_id, device.management_device, device.max_queue_size) == (2, "vdpasim_blk", 256)


def test_names_and_nodes(block_node):
    bus = Bus()
    assert bus.node("blk0") == block_node
    assert bus.device(block_node).name == "blk0"
    with pytest.raises(NoSuchDevice, match="not a vhost-vdpa node"):
        bus.device("/dev/null")
    with pytest.raises(NoSuchDevice, match="no such device"):
        bus.device("nobody")


def test_bind_back_and_forth(passing):
    bus = Bus()
    assert passing.driver == "vhost_vdpa"
    away = bus.bind("passing", "virtio_vdpa")
    assert (away.driver, away.node) == ("virtio_vdpa", None)
    with pytest.raises(NoSuchDevice, match="its driver is virtio_vdpa"):
        bus.node("passing")
    assert bus.bind("passing", "vhost_vdpa").node is not None
    with pytest.raises(VdpaBridgeError, match="no such driver loaded"):
        bus.bind("passing", "vhost-vdpa")


def test_a_held_device_is_neither_deleted_nor_bound(passing):
    bus = Bus()
    with VhostVdpa.open(passing.node):
        for action in (lambda: bus.check_idle("passing", "delete"), lambda: bus.bind("passing", "virtio_vdpa")):
            with pytest.raises(DeviceBusy) as caught:
                action()
            assert f"held by python3 (pid {os.getpid()})" in str(caught.value)
            assert [holder.pid for holder in caught.value.holders] == [os.getpid()]
        done = vdpabridge("del", "passing", check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("vdpabridge: passing: delete: /dev/vhost-vdpa-")
    bus.check_idle("passing", "delete")


def disk_of(name):
    """The block device that virtio_vdpa has made of device ``name``."""
    folder = Path(f"/sys/bus/vdpa/devices/{name}")
    wait_until(lambda: list(folder.glob("virtio*/block/*")))
    disk = next(folder.glob("virtio*/block/*")).name
    wait_until(lambda: os.path.exists(f"/dev/{disk}"))
    return disk


def test_a_mounted_disk_is_not_taken_away(passing, tmp_path):
    bus = Bus()
    bus.bind("passing", "virtio_vdpa")
    disk = disk_of("passing")
    subprocess.run(["mke2fs", "-q", f"/dev/{disk}"], check=True)
    subprocess.run(["mount", "-t", "ext2", f"/dev/{disk}", tmp_path], check=True)
    try:
        for words in (["del", "passing"], ["bind", "passing", "vhost_vdpa"]):
            done = vdpabridge(*words, check=False)
            assert done.returncode == 1
            assert f"{disk} is mounted, or claimed in another way" in done.stderr
        (tmp_path / "file").write_text("it is there still")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    with (
        open(f"/dev/{disk}", "rb"),
        pytest.raises(DeviceBusy, match=rf"{disk} is open in python3 \(pid {os.getpid()}\)"),
    ):
        bus.check_idle("passing", "delete")
    assert bus.bind("passing", "vhost_vdpa").driver == "vhost_vdpa"


def test_looking_whether_a_device_is_idle_does_not_open_it(passing, monkeypatch):
    """To open the node would reset the device, and wait for a VDUSE daemon that does not answer."""
    opened = []
    before = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *words, **options: opened.append(path) or before(path, *words, **options)
    )
    Bus().check_idle("passing", "delete")
    assert opened == []


def until_blocked(process, timeout_s=30.0):
    """Wait until ``process`` sleeps uninterruptibly in the kernel, and goes on doing so."""
    end = time.monotonic() + timeout_s
    seen = 0
    while seen < 20:
        assert process.poll() is None, "it ended"
        assert time.monotonic() < end, "it did not block"
        with open(f"/proc/{process.pid}/stat", encoding="ascii") as stat:
            seen = seen + 1 if stat.read().rpartition(")")[2].split()[0] == "D" else 0
        time.sleep(0.01)


def test_a_forced_deletion_waits_for_the_holder(passing):
    device = VhostVdpa.open(passing.node)
    try:
        with subprocess.Popen([sys.executable, "-m", "vdpabridge", "del", "--force", "passing"]) as deletion:
            until_blocked(deletion)
            device.close()
            assert deletion.wait(30) == 0
    finally:
        device.close()
    assert not os.path.exists(passing.node)


def test_a_device_deleted_while_open_works_until_it_is_closed(netlink, passing):
    """The deletion waits in the kernel; the holder notices nothing; afterwards the node is gone."""
    with running_disk(passing.node) as (_bench, disk):
        deletion = threading.Thread(target=netlink.delete, args=("passing",))
        deletion.start()
        time.sleep(0.2)
        assert deletion.is_alive()
        disk.write(1)
        disk.settle(disk.driver.drain())
        assert disk.verify() == 1
    deletion.join(10)
    assert not deletion.is_alive()
    with pytest.raises(NodeError, match="no such node") as caught:
        VhostVdpa.open(passing.node)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("name", "parent", "code"),
    [
        ("blk0", "vdpasim_blk", errno.EEXIST),
        ("fresh", "nobody", errno.ENODEV),
        ("fresh", "pci/0000:00:00.0", errno.ENODEV),
    ],
)
def test_refused_additions(netlink, block_node, name, parent, code):
    with pytest.raises(BusError) as caught:
        netlink.add(name, parent)
    assert caught.value.errno == code


def test_refused_deletion(netlink):
    with pytest.raises(BusError, match="no such device") as caught:
        netlink.delete("nobody")
    assert caught.value.errno == errno.ENODEV


def test_events_of_a_devices_life(netlink):
    with BusEvents() as events:
        netlink.add("eventful", "vdpasim_blk")
        Bus().bind("eventful", "vhost_vdpa")
        netlink.delete("eventful")
        seen = []
        while event := events.next(timeout_s=1.0):
            seen.append(event)
            if event.action == "remove":
                break
    assert seen[0] == BusEvent("add", "eventful", None)
    assert [event.action for event in seen] == ["add", "bind", "unbind", "bind", "unbind", "remove"]
    assert [event.driver for event in seen if event.action == "bind"] == ["virtio_vdpa", "vhost_vdpa"]
    assert {event.name for event in seen} == {"eventful"}


def test_no_event_is_none_in_time():
    with BusEvents() as events:
        assert events.next(timeout_s=0.05) is None


def test_list_and_show(block_node, net_node):
    table = vdpabridge("list").stdout.splitlines()
    assert table[0].split() == ["NAME", "DRIVER", "NODE"]
    assert ["blk0", "vhost_vdpa", block_node] in [line.split() for line in table]
    records = json.loads(vdpabridge("show", "-j").stdout)["dev"]
    assert records["blk0"] | {"held_by": None} == {
        "type": "block",
        "mgmtdev": "vdpasim_blk",
        "vendor_id": 0,
        "max_vqs": 1,
        "max_vq_size": 256,
        "device_id": 2,
        "driver": "vhost_vdpa",
        "path": block_node,
        "held_by": None,
    }
    assert records["net0"]["type"] == "network"
    only = json.loads(vdpabridge("-j", "-p", "show", "blk0").stdout)
    assert list(only["dev"]) == ["blk0"]


def test_json_agrees_with_iproute2(block_node, net_node):
    """The fields that iproute2 prints are printed by the same names and with the same values."""
    theirs = json.loads(subprocess.run(["vdpa", "-j", "dev", "show"], capture_output=True, check=True).stdout)["dev"]
    ours = json.loads(vdpabridge("-j", "show").stdout)["dev"]
    for name, record in theirs.items():
        assert record.items() <= ours[name].items()
    theirs = json.loads(subprocess.run(["vdpa", "-j", "mgmtdev", "show"], capture_output=True, check=True).stdout)
    ours = json.loads(vdpabridge("-j", "show", "--mgmtdev").stdout)
    for handle, record in theirs["mgmtdev"].items():
        assert ours["mgmtdev"][handle]["supported_classes"] == record["supported_classes"]
        assert ours["mgmtdev"][handle]["dev_features"] == record["dev_features"]


def test_add_bind_del_by_command():
    made = json.loads(
        vdpabridge("-j", "add", "typed", "--mgmtdev", "vdpasim_net", "--driver", "vhost_vdpa", "--mtu", "1400").stdout
    )
    assert made["dev"]["typed"]["driver"] == "vhost_vdpa"
    assert vdpabridge("bind", "typed", "virtio_vdpa").stdout == "typed: driver virtio_vdpa\n"
    vdpabridge("del", "typed")
    gone = vdpabridge("-j", "show", "typed", check=False)
    assert gone.returncode == 1
    assert json.loads(gone.stderr)["error"]["what"] == "no such device"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"mac": "nonsense"}, "not a MAC address"),
        ({"mtu": 70000}, "an MTU is 68 to 65535, not 70000"),
        ({"mtu": 0}, "an MTU is"),
    ],
)
def test_wrong_values_are_refused_before_the_kernel_sees_them(netlink, values, why):
    with pytest.raises(VdpaBridgeError, match=why):
        netlink.add("odd", "vdpasim_net", **values)
    assert "odd" not in {device.name for device in Bus().devices()}


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a b", pytest.param("x" * 256, id="256 letters")])
def test_names_that_lead_astray_are_refused(netlink, name):
    with pytest.raises(VdpaBridgeError, match="a device's name is made of letters, digits"):
        netlink.add(name, "vdpasim_blk")


def test_an_addition_that_cannot_be_bound_is_taken_back():
    done = vdpabridge("add", "odd", "--mgmtdev", "vdpasim_blk", "--driver", "nonsense", check=False)
    assert done.returncode == 2
    assert "odd" not in {device.name for device in Bus().devices()}
