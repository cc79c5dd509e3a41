"""The bus on a made-up sysfs, and uevents by their bytes. The real ones are in tests/vm."""

import mmap
import os
import resource

import pytest

from vdpabridge.bus import Bus, BusError, DeviceBusy, NoSuchDevice
from vdpabridge.bus.events import BusEvent, BusEvents, parse_uevent
from vdpabridge.errors import VdpaBridgeError


@pytest.fixture
def sysfs(tmp_path):
    bus = tmp_path / "bus/vdpa"
    for driver in ("vhost_vdpa", "virtio_vdpa"):
        (bus / "drivers" / driver).mkdir(parents=True)
        (bus / "drivers" / driver / "unbind").touch()
    (bus / "drivers_probe").touch()
    for name, driver, node in (("b0", "vhost_vdpa", "vhost-vdpa-3"), ("a1", "virtio_vdpa", None), ("c2", None, None)):
        folder = bus / "devices" / name
        folder.mkdir(parents=True)
        (folder / "driver_override").touch()
        if driver:
            (folder / "driver").symlink_to(bus / "drivers" / driver)
        if node:
            (folder / node).mkdir()
    return Bus(str(tmp_path), str(tmp_path / "dev"))


def test_devices_by_name(sysfs, tmp_path):
    assert [(device.name, device.driver, device.node) for device in sysfs.devices()] == [
        ("a1", "virtio_vdpa", None),
        ("b0", "vhost_vdpa", f"{tmp_path}/dev/vhost-vdpa-3"),
        ("c2", None, None),
    ]


def test_no_bus():
    with pytest.raises(NoSuchDevice, match=r"this kernel has none loaded .'modprobe vdpa'"):
        Bus("/nonexistent").devices()
    with pytest.raises(NoSuchDevice, match="this kernel has none loaded"):
        Bus("/nonexistent").device("d0")


def test_unknown_names_and_paths(sysfs):
    with pytest.raises(NoSuchDevice, match="nobody: no such device"):
        sysfs.device("nobody")
    with pytest.raises(NoSuchDevice, match="/dev/null: not a vhost-vdpa node"):
        sysfs.device("/dev/null")
    with pytest.raises(NoSuchDevice, match="no such node"):
        sysfs.device("/dev/nothing-of-the-kind")
    with pytest.raises(NoSuchDevice, match="its driver is none"):
        sysfs.node("c2")


def test_bind_writes_override_unbind_probe_and_looks(sysfs, tmp_path):
    with pytest.raises(VdpaBridgeError, match="the driver did not take it; it has virtio_vdpa now"):
        sysfs.bind("a1", "vhost_vdpa")
    bus = tmp_path / "bus/vdpa"
    # what was tried is taken back
    assert (bus / "devices/a1/driver_override").read_text() == "virtio_vdpa"
    assert (bus / "drivers/virtio_vdpa/unbind").read_text() == "a1"
    assert (bus / "drivers_probe").read_text() == "a1"
    assert sysfs.bind("b0", "vhost_vdpa").driver == "vhost_vdpa"


def test_bind_to_what_is_no_driver(sysfs):
    with pytest.raises(VdpaBridgeError, match="the bus's drivers are vhost_vdpa, virtio_vdpa"):
        sysfs.bind("a1", "vhost-vdpa")


def test_a_refused_write_keeps_errno(sysfs, tmp_path):
    (tmp_path / "bus/vdpa/devices/c2/driver_override").unlink()
    (tmp_path / "bus/vdpa/devices/c2/driver_override").mkdir()
    with pytest.raises(BusError) as caught:
        sysfs.bind("c2", "vhost_vdpa")
    assert caught.value.errno == 21


UEVENTS = [
    (
        b"bind@/devices/d0\0ACTION=bind\0DEVPATH=/devices/d0\0SUBSYSTEM=vdpa\0DRIVER=vhost_vdpa\0SEQNUM=7\0",
        BusEvent("bind", "d0", "vhost_vdpa"),
    ),
    (b"add@/devices/d0\0ACTION=add\0DEVPATH=/devices/d0\0SUBSYSTEM=vdpa\0SEQNUM=5\0", BusEvent("add", "d0", None)),
    (b"add@/devices/x\0ACTION=add\0DEVPATH=/devices/x\0SUBSYSTEM=net\0", None),
    (b"libudev\0\xfe\xed\xca\xfe", None),
    (b"", None),
]


@pytest.mark.parametrize(("message", "event"), UEVENTS)
def test_uevents(message, event):
    assert parse_uevent(message) == event


def test_holders_of_a_node():
    from vdpabridge.linux.holders import holders

    fd = os.open("/dev/full", os.O_RDWR)
    try:
        assert os.getpid() in [holder.pid for holder in holders("/dev/full")]
    finally:
        os.close(fd)
    assert os.getpid() not in [holder.pid for holder in holders("/dev/full")]
    assert holders("/dev/nothing-of-the-kind") == []


def test_holders_by_a_mapping_only():
    from vdpabridge.linux.holders import holders

    with open("/dev/zero", "rb") as zero:
        page = mmap.mmap(zero.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE)
    assert os.getpid() in [holder.pid for holder in holders("/dev/zero")]
    page.close()
    assert os.getpid() not in [holder.pid for holder in holders("/dev/zero")]


def test_an_interface_that_is_up(sysfs, tmp_path):
    for name, flags in (("eth0", "0x1003"), ("eth1", "0x1002")):
        folder = tmp_path / "bus/vdpa/devices/a1/virtio7/net" / name
        folder.mkdir(parents=True)
        (folder / "flags").write_text(f"{flags}\n")
    node = next((tmp_path / "bus/vdpa/devices/a1").glob("vhost-vdpa-*"), None)
    assert node is None
    with pytest.raises(DeviceBusy, match=r"network interface eth0 is up \("):
        sysfs.check_idle("a1", "delete")
    sysfs.check_idle("a1", "delete", force=True)


def test_a_name_that_is_not_ascii(sysfs, tmp_path):
    (tmp_path / "bus/vdpa/devices/gerät").mkdir()
    (tmp_path / "bus/vdpa/devices/gerät/driver_override").touch()
    with pytest.raises(VdpaBridgeError, match="the driver did not take it"):
        sysfs.bind("gerät", "vhost_vdpa")
    assert (tmp_path / "bus/vdpa/drivers_probe").read_text(encoding="utf-8") == "gerät"


def test_events_with_many_descriptors_open():
    """select(2) knows no descriptor above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1030)]
    try:
        with BusEvents() as events:
            assert events.fileno() > 1023
            assert events.next(timeout_s=0.01) is None
    finally:
        for fd in many:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
