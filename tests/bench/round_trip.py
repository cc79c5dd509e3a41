"""A request and its reply: the same C back-end, asked by a C front-end and by our driver."""

import os
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from vdpabridge.abi.vhost_user import FrontendRequest
from vdpabridge.drivers.vhost_user import VhostUser

from .table import show

SOURCE = Path(__file__).with_name("round_trip.c")
TIMES = 20_000


def measure(runs):
    """``runs`` times each, in turns; on one processor, where nothing but the two programs' work counts, and on two, where
    waking the other up costs most."""
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        program = f"{folder}/round_trip"
        subprocess.run(["gcc", "-O2", "-o", program, SOURCE], check=True)
        ways = {"C": lambda path: by_c(program, path), "vdpabridge": by_driver}
        facts = {}
        processors = sorted(os.sched_getaffinity(0))[:2]
        for places in range(1, len(processors) + 1):
            series = {name: [] for name in ways}
            for number in range(runs):
                for name, way in ways.items():
                    with (
                        placed(processors[0]),
                        back_end(program, f"{folder}/{name}{number}{places}") as path,
                        placed(processors[places - 1]),
                    ):
                        series[name].append(way(path) / TIMES * 1e6)
            title = f"GET_FEATURES of a C back-end, {'both on one processor' if places == 1 else 'on two processors'}"
            facts[title] = show(title, "us", series, against="C")
        return facts


@contextmanager
def placed(number):
    """On the processor of that number; children too."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {number})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def back_end(program, path):
    with subprocess.Popen([program, "serve", path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield path
        process.stdout.close()
        assert process.wait(10) == 0


def by_c(program, path):
    done = subprocess.run([program, "ask", path, str(TIMES)], capture_output=True, check=True)
    return int(done.stdout) / 1e9


def by_driver(path):
    with VhostUser.open(path, timeout_s=10) as device:
        ask = device._requests.number
        begin_s = time.perf_counter()
        for _ in range(TIMES):
            ask(FrontendRequest.GET_FEATURES)
        return time.perf_counter() - begin_s
