"""`vdpabridge ioctl` on a real kernel."""

import json
import subprocess
import sys


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "vdpabridge", "-j", "ioctl", *words], capture_output=True, text=True, check=False
    )


def test_requests_by_name(block_node):
    names = ("VHOST_VDPA_GET_DEVICE_ID", "VHOST_SET_OWNER", "VHOST_GET_VRING_BASE", "index=0", "VHOST_VDPA_SUSPEND")
    done = run(block_node, *names)
    assert (done.returncode, done.stderr) == (0, "")
    answers = json.loads(done.stdout)["ioctl"]
    assert [each["argument"] for each in answers] == [{"value": 2}, {}, {"index": 0, "num": 0}, {}]
    assert {each["returned"] for each in answers} == {0}


def test_a_request_that_the_kernel_does_not_know(block_node):
    done = run(block_node, "VHOST_SET_OWNER", "0x4010aff0", "bytes=00")
    assert done.returncode == 1
    assert "ENOTTY" in json.loads(done.stderr)["error"]["why"]


def test_by_the_devices_name(block_node):
    done = run("vdpa:blk0", "VHOST_VDPA_GET_STATUS")
    assert json.loads(done.stdout)["ioctl"] == [
        {"request": "VHOST_VDPA_GET_STATUS", "returned": 0, "argument": {"value": 0}}
    ]
