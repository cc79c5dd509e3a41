"""SIGKILL at every step of suspend and restore: the next opener finds a working device, and nothing is left."""

import subprocess
import sys
import time

import pytest

from ..support.victim import STEPS
from .conftest import running_disk


def counters():
    """Pinned pages not given back, and open files of the whole machine."""
    with open("/proc/sys/vm/stat_refresh", encoding="ascii") as refresh:
        refresh.read()  # folds what each CPU has counted for itself into the totals
    with open("/proc/vmstat", encoding="ascii") as vmstat:
        values = dict(line.split() for line in vmstat)
    with open("/proc/sys/fs/file-nr", encoding="ascii") as files:
        open_files = int(files.read().split()[0])
    return int(values["nr_foll_pin_acquired"]) - int(values["nr_foll_pin_released"]), open_files


def settled(expected, timeout_s=5.0):
    """The counters, once they are back at ``expected`` or the time is over: files are released a moment after exit."""
    end = time.monotonic() + timeout_s
    while (now := counters()) > expected and time.monotonic() < end:
        time.sleep(0.02)
    return now


@pytest.mark.parametrize("step", STEPS)
def test_killed_at(block_node, second_block_node, step):
    before = counters()
    command = [sys.executable, "-m", "tests.support.victim", step, block_node, second_block_node]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout.readline() == "there\n"
        victim.kill()
    for node in (block_node, second_block_node):
        with running_disk(node) as (bench, disk):
            for block in range(50):
                disk.write(block)
            disk.settle(disk.driver.drain())
            assert disk.verify() == 50
            bench.device.suspend()
    pinned, open_files = settled(before)
    assert pinned <= before[0], "pages of the killed process are still pinned"
    # udev, cron and the like are not running here; the slack is for the kernel's per-CPU counting
    assert open_files <= before[1] + 64
