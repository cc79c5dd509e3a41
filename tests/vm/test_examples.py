"""The examples for vDPA devices, on the simulators of a real kernel."""

import subprocess

from vdpabridge.bus import Bus
from vdpabridge.bus.netlink import VdpaNetlink

from ..support.examples import ENVIRONMENT, command, output_of
from ..support.waiting import wait_until


def test_suspend(block_node):
    said = output_of("suspend_vdpa.py", block_node).splitlines()
    assert said[0].startswith("suspended, queue 0 at ")
    assert said[1].startswith("running, by ")
    assert said[2] == "16 blocks read back as they were written"


def test_watch_the_bus(block_node):
    del block_node
    words = command("watch_bus.py", "5")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, bufsize=1) as process:
        try:
            assert process.stdout.readline().startswith("blk0: driver ")
            with VdpaNetlink() as netlink:
                netlink.add("passing", "vdpasim_blk")
                wait_until(lambda: "passing" in {device.name for device in Bus().devices()})
                netlink.delete("passing")
            said = process.communicate(timeout=60)[0].splitlines()
        finally:
            process.kill()
    assert [line for line in said if line in ("passing: add", "passing: remove")] == ["passing: add", "passing: remove"]
    assert process.returncode == 0
