"""SIGKILL at every step of suspend and restore: the next opener finds a working device, and nothing is left."""

import os
import subprocess
import sys
import time

import pytest

from ..support.victim import STEPS
from .conftest import running_disk

#: Kills for each step. A victim has about ten files open: what one kill in all of a step's leaked would be seen.
KILLS = 2
#: Files of others: udev, for one.
SLACK_FILES = 20
#: A CPU counts at most so many open files for itself (lib/percpu_counter.c) before it folds them into the total.
FOLD_MAX = 80
#: Files of pytest's own, in memory too.
SLACK_PAGES = 64


def counters():
    """Pinned pages not given back, pages of shared memory, and open files, of the whole machine."""
    with open("/proc/sys/vm/stat_refresh", encoding="ascii") as refresh:
        refresh.read()  # folds what each CPU has counted for itself into the totals
    with open("/proc/vmstat", encoding="ascii") as vmstat:
        values = dict(line.split() for line in vmstat)
    pinned = int(values["nr_foll_pin_acquired"]) - int(values["nr_foll_pin_released"])
    return pinned, int(values["nr_shmem"])


def open_files():
    """Open files of the whole machine. The total lacks what each CPU has counted for itself, so each is brought to
    fold that in: by files that are opened there until the total moves, and that are taken off again here."""
    cpus = os.sched_getaffinity(0)
    held = []
    total = os.open("/proc/sys/fs/file-nr", os.O_RDONLY)
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            before = os.pread(total, 64, 0)
            while os.pread(total, 64, 0) == before and len(held) < FOLD_MAX * len(cpus):
                held.append(os.open("/dev/null", os.O_RDONLY))
        return int(os.pread(total, 64, 0).split()[0]) - len(held)
    finally:
        for fd in (*held, total):
            os.close(fd)
        os.sched_setaffinity(0, cpus)


@pytest.fixture(scope="module")
def baseline(block_node, second_block_node):
    use(block_node, second_block_node)
    time.sleep(0.1)
    return (*counters(), open_files())


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
    # a guest's memory that one of the two had left would be more than that; a node that was left open is busy
    assert settled(baseline)[1] < baseline[1] + SLACK_PAGES, "memory of killed processes is still there"


def settled(baseline):
    """The counters, when what the kernel gives back later is given back, or after a while."""
    end = time.monotonic() + 5
    while True:
        pinned, pages = now = counters()
        if (pinned <= baseline[0] and pages < baseline[1] + SLACK_PAGES) or time.monotonic() > end:
            return now
        time.sleep(0.05)


def test_nothing_was_left_by_all_those(baseline):
    """After some forty kills, a single file or page that each left would be far above the slack."""
    pinned, _ = settled(baseline)
    assert pinned <= baseline[0], "pages of killed processes are still pinned"
    assert open_files() < baseline[2] + SLACK_FILES
