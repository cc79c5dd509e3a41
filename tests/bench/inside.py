"""``python3 -m tests.bench.inside PROGRAM RUNS``, in the test machine: what requests and blackouts take, as JSON.

PROGRAM is blackout.c, compiled.
"""

import fcntl
import json
import subprocess
import sys
import time

from vdpabridge.abi.vhost import VhostIoctl
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.procedures import migrate
from vdpabridge.state.transfer.channel import Limits

from ..vm.conftest import VERSION_1, make_device

TIMES = 10_000


def main():
    program, runs = sys.argv[1], int(sys.argv[2])
    nodes = [make_device(name, "vdpasim_blk") for name in ("blk0", "blk1")]
    ways = {
        "blackout": {
            "C": lambda: by_c(program, *nodes),
            "vdpabridge": lambda: moved(*nodes, None),
            "vdpabridge, with deadlines": lambda: moved(*nodes, 10),
        },
        "ioctl": {
            "C": lambda: by_c(program, "ioctl", nodes[0], str(TIMES)) / TIMES,
            "fcntl.ioctl": lambda: bare(nodes[0]) / TIMES,
            "vdpabridge": lambda: asked(nodes[0], None) / TIMES,
            "vdpabridge, with a deadline": lambda: asked(nodes[0], 10) / TIMES,
        },
    }
    series = {what: {name: [] for name in those} for what, those in ways.items()}
    for what, those in ways.items():
        # the first of each warms caches and is not counted
        for number in range(runs + 1):
            for name, way in those.items():
                value = way()
                if number:
                    series[what][name].append(value)
    print(json.dumps(series))


def by_c(program, *words):
    """Nanoseconds, as the program says."""
    return int(subprocess.run([program, *words], capture_output=True, check=True).stdout)


def moved(source_node, destination_node, timeout_s):
    """Nanoseconds between the beginning of the suspend and the end of the start."""
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 256) as queue,
        VhostVdpa.open(source_node, timeout_s=timeout_s) as source,
        VhostVdpa.open(destination_node, timeout_s=timeout_s) as destination,
    ):
        for device in (source, destination):
            device.map([memory.region])
        source.accept_features(VERSION_1)
        queue.attach(source, 0)
        source.start()
        report = migrate(source, destination, Limits(Deadline(timeout_s)))
        steps = {step.name: step for step in report.steps}
        return (steps["start"].end_s - steps["suspend"].begin_s) * 1e9


def bare(node):
    with open(node, "r+b", buffering=0) as file:
        buffer = bytearray(1)
        begin_ns = time.perf_counter_ns()
        for _ in range(TIMES):
            fcntl.ioctl(file, VhostIoctl.VHOST_VDPA_GET_STATUS, buffer)
        return time.perf_counter_ns() - begin_ns


def asked(node, timeout_s):
    with VhostVdpa.open(node, timeout_s=timeout_s) as device:
        begin_ns = time.perf_counter_ns()
        for _ in range(TIMES if timeout_s is None else TIMES // 10):
            device.status  # noqa: B018
        took_ns = time.perf_counter_ns() - begin_ns
        return took_ns if timeout_s is None else took_ns * 10


if __name__ == "__main__":
    main()
