"""Whole processes: what the commands people type most take before they have done anything."""

import subprocess
import sys
import time

from .table import show

EMPTY = "python3 -c pass"
#: What pip writes into the command's file.
COMMAND = "import sys; from vdpabridge.cli import main; sys.exit(main())"
PAIRS = 5


def measure(runs):
    """``runs`` times each, in turns; each time the least of a few, since what disturbs only adds."""
    ways = {
        EMPTY: ["-c", "pass"],
        "vdpabridge list": ["-c", COMMAND, "list"],
        "vdpabridge --help": ["-c", COMMAND, "--help"],
    }
    series = {name: [] for name in ways}
    for _ in range(runs):
        for name, words in ways.items():
            series[name].append(min(timed(words) for _ in range(PAIRS)))
    return show("Whole processes", "ms", series, against=EMPTY)


def timed(words):
    begin_s = time.perf_counter()
    # 1: this kernel has no vDPA bus, and 'list' says so
    code = subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode
    assert code in (0, 1)
    return (time.perf_counter() - begin_s) * 1000
