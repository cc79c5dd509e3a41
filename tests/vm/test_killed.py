"""SIGKILL at every step of suspend and restore: the next opener finds a working device, and nothing is left."""

import subprocess
import sys
import time

import pytest

from ..support.victim import STEPS
from .conftest import running_disk

#: Kills for each step. A victim has about ten files open: what one kill in all of a step's leaked would be seen.
KILLS = 2
#: The kernel counts open files on each CPU for itself and folds them in by and by.
SLACK_FILES = 40


def counters():
    """Pinned pages not given back, and open files of the whole machine."""
    with open("/proc/sys/vm/stat_refresh", encoding="ascii") as refresh:
        refresh.read()  # folds what each CPU has counted for itself into the totals
    with open("/proc/vmstat", encoding="ascii") as vmstat:
        values = dict(line.split() for line in vmstat)
    with open("/proc/sys/fs/file-nr", encoding="ascii") as files:
        open_files = int(files.read().split()[0])
    return int(values["nr_foll_pin_acquired"]) - int(values["nr_foll_pin_released"]), open_files


@pytest.fixture(scope="module")
def baseline(block_node, second_block_node):
    use(block_node, second_block_node)
    time.sleep(0.1)
    return counters()


def use(*nodes):
    """Open, run, suspend and close each: it must work."""
    for node in nodes:
        with running_disk(node) as (bench, disk):
            for block in range(50):
                disk.write(block)
            disk.settle(disk.driver.drain())
            assert disk.verify() == 50
            bench.device.suspend()


@pytest.mark.parametrize("step", STEPS)
def test_killed_at(block_node, second_block_node, baseline, step):
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.support.victim", step, block_node, second_block_node]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout.readline() == "there\n"
            victim.kill()
        use(block_node, second_block_node)


def test_nothing_was_left_by_all_those(baseline):
    """After some forty kills, a single file or page that each left would be far above the slack."""
    end = time.monotonic() + 5
    while (now := counters())[0] > baseline[0] and time.monotonic() < end:
        time.sleep(0.05)
    pinned, open_files = now
    assert pinned <= baseline[0], "pages of killed processes are still pinned"
    assert open_files < baseline[1] + SLACK_FILES
