"""Every program in examples/ does what it says; those for vDPA devices run on a kernel (tests/vm/test_examples.py)."""

import signal
import subprocess

import pytest

from vdpabridge.drivers.vhost_user import VhostUser

from .cli.test_serve import is_served, serving
from .support.examples import ENVIRONMENT, FOLDER, command, output_of
from .support.waiting import wait_until

#: Each has a test here, in tests/peers or in tests/vm.
EXAMPLES = {
    "control_socket.py",
    "inspect_image.py",
    "migrate_disk.py",
    "save_virtiofsd.py",
    "serve_disk.py",
    "suspend_vdpa.py",
    "timed_driver.py",
    "watch_bus.py",
}


def test_there_are_no_others():
    assert {path.name for path in FOLDER.glob("*.py")} == EXAMPLES


def test_suspend():
    said = output_of("suspend_vdpa.py", "sim:blk").splitlines()
    assert said[0].startswith("suspended, queue 0 at ")
    assert 8 <= int(said[0].rsplit(" ", 1)[1]) <= 16
    assert said[1:] == ["running, by RESUME", "16 blocks read back as they were written"]


def test_save_and_inspect(tmp_path):
    said = output_of("save_virtiofsd.py", "sim:fs", "lines", tmp_path / "image").splitlines()
    assert said[0].endswith("bytes of device state; the device is running")
    assert said[-1] == "read on: the same"
    assert [line.split(":")[0].strip() for line in said[1:-1]] == [
        "suspend",
        "capture",
        "device state",
        "check",
        "end",
        "resume",
    ]
    told = output_of("inspect_image.py", tmp_path / "image", "sim:fs").splitlines()
    assert told[0] == "fs, 2 queues, features VERSION_1"
    assert told[1] == "queue 0: 128 descriptors, at 0"
    assert told[3].endswith("vdpabridge's simulator, version 2")


def test_inspect_refuses_what_is_not_whole(tmp_path):
    output_of("save_virtiofsd.py", "sim:fs", "lines", tmp_path / "image")
    whole = (tmp_path / "image").read_bytes()
    (tmp_path / "image").write_bytes(whole[:-1])
    done = subprocess.run(
        command("inspect_image.py", tmp_path / "image", "sim:fs"),
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("not a whole image: ")


@pytest.mark.parametrize("names", [("sim:blk", "sim:blk"), ("sim:blk,size=1M", "sim:blk,size=1M")])
def test_migrate(names):
    said = output_of("migrate_disk.py", *names).splitlines()
    assert said[0] == "the source is reset, the destination is running"
    assert said[2] == "16 blocks read back as they were written"


def test_a_migration_that_fails_says_what_runs(tmp_path):
    for name, size in (("one", 1 << 20), ("other", 2 << 20)):
        (tmp_path / name).write_bytes(bytes(size))
    done = subprocess.run(
        command("migrate_disk.py", f"sim:blk,file={tmp_path}/one", f"sim:blk,file={tmp_path}/other"),
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 1
    assert "its configuration space differs in capacity" in done.stderr


def test_serve(tmp_path):
    path = str(tmp_path / "s")
    with subprocess.Popen(
        command("serve_disk.py", path), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        try:
            wait_until(lambda: is_served(path))
            with VhostUser.open(path, timeout_s=10) as device:
                assert device.offered_features >> 32 & 1
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 0
    assert said.splitlines()[0] == f"serving sim:blk on {path}"


def test_a_driver_of_ones_own():
    done = subprocess.run(
        command("timed_driver.py", "timed:sim:blk"),
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "timed:sim:blk is running\n")
    said = [line.split(": ")[1] for line in done.stderr.splitlines()]
    assert said == ["start", "suspend", "resume"]


def test_the_control_socket(tmp_path):
    path, control = str(tmp_path / "s"), str(tmp_path / "c")
    with serving("sim:fs", "--socket-path", path, "--control", control):
        wait_until(lambda: is_served(control))
        done = subprocess.run(
            command("control_socket.py", control, tmp_path / "image"),
            capture_output=True,
            text=True,
            timeout=60,
            env=ENVIRONMENT,
            check=False,
        )
    # no front-end has set the device up, so there is nothing to save yet
    assert done.stdout == "sim:fs is reset\n"
    assert done.stderr.startswith("not saved: ")
    assert done.returncode == 1
