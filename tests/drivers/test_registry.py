"""What names a device, and drivers of other packages."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from vdpabridge.drivers.built_in import DRIVERS
from vdpabridge.drivers.names import DeviceNameError
from vdpabridge.drivers.opening import device_id_of, named, open_device
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import VdpaBridgeError

from ..cli.test_serve import COMMAND, ROOT

OTHER = """
from vdpabridge.drivers.registry import Driver
from vdpabridge.drivers.sim import Sim


def check(name):
    name.allow(("size",))


def open_device(name, timeout_s):
    return Sim.blk(name.integer("size", 1 << 20), timeout_s=timeout_s)


DRIVER = Driver(check, open_device, lambda _name: 2)
WRONG = object()
"""


@contextmanager
def other_package(folder, entry="other_package:DRIVER", content=OTHER):
    """A package that is installed in ``folder``, with a driver for devices of kind ``other``."""
    metadata = folder / "other-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vdpabridge.drivers]\nother = {entry}\n")
    (folder / "other_package.py").write_text(content)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("other_package", None)


def test_kinds():
    assert list(DRIVERS) == ["vhost-vdpa", "vdpa", "vhost-user", "sim"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("blk0", "that is not the name of a device"),
        (":blk", "that is not the name of a device"),
        ("sim:", "that is not the name of a device"),
        ("sim:tape", "there is no simulated 'tape'"),
        ("nvme:0", "there is no kind 'nvme'"),
        ("sim:blk,files=3", "it has no option 'files'"),
        ("vdpa:blk0,queues=2", "it has no option 'queues'"),
        ("/dev/vhost-vdpa-0", None),
        ("vdpa:blk0", None),
        ("vhost-user:/run/s,id=fs,queues=3", None),
        ("sim:blk,size=1M,queues=4", None),
    ],
)
def test_names(text, why):
    if why is None:
        assert named(text)[1].text == text
    else:
        with pytest.raises(DeviceNameError, match=why):
            named(text)


@pytest.mark.parametrize(
    ("text", "device_id"), [("sim:blk", 2), ("sim:fs", 26), ("vhost-user:/x,id=7", 7), ("vhost-user:/x", None)]
)
def test_what_a_device_is_without_opening_it(text, device_id):
    assert device_id_of(text) == device_id


def test_a_driver_of_another_package(tmp_path):
    with other_package(tmp_path), open_device("other:disk,size=64K", timeout_s=2) as device:
        assert device.identity.device_id == device_id_of("other:disk") == 2
        assert int.from_bytes(device.read_config(0, 8), "little") == 128
        with pytest.raises(DeviceNameError, match="it has no option 'colour'"):
            named("other:disk,colour=red")


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("other_package:WRONG", "other_package:WRONG is not a vdpabridge Driver"),
        ("other_package:MISSING", "the driver other_package:MISSING does not load"),
        ("no_such_package:DRIVER", "the driver no_such_package:DRIVER does not load"),
    ],
)
def test_a_driver_that_does_not_load(entry, why, tmp_path):
    with other_package(tmp_path, entry), pytest.raises(VdpaBridgeError, match=why):
        named("other:disk")


def test_a_driver_of_another_package_is_served(tmp_path):
    with other_package(tmp_path):
        path = tmp_path / "socket"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        words = [*COMMAND, "serve", "other:disk", "--socket-path", str(path), "--once"]
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
            with VhostUser.open(str(path), device_id=2, timeout_s=10) as device:
                assert device.identity.queue_count == 2
            assert process.wait(10) == 0
