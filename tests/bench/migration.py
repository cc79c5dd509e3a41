"""Live migration of a guest with an open file: virtiofsd at QEMU's socket, or our exporter and driver in between.

Downtime and total time are QEMU's own (query-migrate).
"""

import shutil
import tempfile
from pathlib import Path

from vmimages.initramfs import write_initramfs
from vmimages.kernel import DEFAULT_KERNEL, kernel
from vmimages.peers import peers

from ..peers.test_qemu import fs, goes_on, prepare, reading_guest, start_back_end
from ..support.machine import lab_in
from .table import show

KINDS = {"virtiofsd, directly": "virtiofsd", "through vdpabridge, both": "proxy"}


def measure(runs):
    """Migrate ``runs`` times each way, in turns."""
    tree = peers()
    scratch = Path(tempfile.mkdtemp(prefix="vb-"))
    try:
        initramfs = scratch / "initramfs"
        guest_init = Path(__file__).parent.parent / "peers" / "guest-init"
        write_initramfs(initramfs, tree.path("busybox"), guest_init)
        machine = (tree, kernel(DEFAULT_KERNEL).image, initramfs)
        series = {name: [] for name in KINDS}
        for _ in range(runs):
            for name, kind in KINDS.items():
                series[name].append(one(kind, *machine))
    finally:
        shutil.rmtree(scratch)
    direct = next(iter(KINDS))
    facts = {}
    for what, title in (("downtime", "Migration: downtime"), ("total-time", "Migration: total time")):
        values = {name: [float(each[what]) for each in those] for name, those in series.items()}
        facts[what] = show(title, "ms", values, against=direct)
    return facts


def one(kind, tree, image, initramfs):
    """What QEMU says about one migration."""
    work = Path(tempfile.mkdtemp(prefix="vb-"))
    try:
        with lab_in(work, tree, image, initramfs) as lab:
            start_back_end(lab, kind, "a.sock")
            start_back_end(lab, kind, "b.sock")
            source = reading_guest(lab, "source", *fs(lab, "a.sock"))
            destination = lab.guest("destination", *fs(lab, "b.sock"), incoming=f"unix:{lab.path('migration')}")
            prepare(source)
            facts = source.migrate(f"unix:{lab.path('migration')}")
            assert facts["status"] == "completed", facts
            goes_on(destination)
            return facts
    finally:
        shutil.rmtree(work)
