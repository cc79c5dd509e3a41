"""vhost-vdpa on a real kernel, in the test machine: what a request and a blackout take, in C and here."""

import json
import subprocess
import tempfile
from pathlib import Path

from .table import show

SOURCE = Path(__file__).with_name("blackout.c")
REPOSITORY = Path(__file__).parents[2]
TITLES = {
    "blackout": "Blackout of a disk that moves between two simulated devices, in the test machine",
    "ioctl": "GET_STATUS, in the test machine",
}
AGAINST = {"blackout": "C", "ioctl": "fcntl.ioctl"}


def measure(runs):
    """Each ``runs`` times, in turns, in one boot of the machine."""
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        program = Path(folder) / "blackout"
        subprocess.run(["gcc", "-O2", "-static", "-o", program, SOURCE], check=True)
        inside = ["python3", "-m", "tests.bench.inside", f"/run/payload/with/{program.name}", str(runs)]
        words = [REPOSITORY / "vm-images" / "run", "6.12", "--with", program, "--", *inside]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    facts = {}
    for what, series in json.loads(done.stdout.splitlines()[-1]).items():
        in_us = {name: [value / 1000 for value in values] for name, values in series.items()}
        facts[what] = show(TITLES[what], "us", in_us, against=AGAINST[what])
    return facts
