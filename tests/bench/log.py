"""What a dirty log costs a device that keeps none: reads of a disk, with the log and without.

Three processes take part: a guest in miniature, our exporter, QEMU's storage daemon. Without a log, kicks and calls go
past the exporter.
"""

import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from vmimages.peers import peers

from vdpabridge.abi.virtio import VIRTIO_F_VERSION_1
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.guest.block import BLOCK_BYTES, BlockDriver
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.deadline import Deadline

from ..support.dirty_log import Bitmap
from ..support.machine import Lab, wait_for_socket
from ..support.unlogged import register
from .table import show

DEPTHS = (1, 8, 64)
READS = 8192
MEMORY_BYTES = 4 << 20
DISK_BYTES = 16 << 20


def measure(runs):
    """``runs`` times each, in turns, for one connection."""
    work = Path(tempfile.mkdtemp(prefix="vb-"))
    lab = Lab(work, peers(), None, None)
    try:
        return _measure(runs, lab)
    finally:
        lab.close()
        shutil.rmtree(work)


def _measure(runs, lab):
    serve_disk(lab)
    reads = {depth: {"without": [], "with a log": []} for depth in DEPTHS}
    changes = {"the log begins": [], "the log ends": []}
    with ExitStack() as stack:
        device = stack.enter_context(VhostUser.open(lab.path("bridge.sock"), device_id=2, timeout_s=10))
        memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
        queue = stack.enter_context(SplitQueue(memory, 256))
        device.map([memory.region])
        device.accept_features(1 << VIRTIO_F_VERSION_1)
        queue.attach(device, 0)
        device.start()
        driver = BlockDriver(memory, queue)
        log = stack.enter_context(Bitmap(memory)).log
        for _ in range(runs):
            for what, name in ((None, "without"), (log, "with a log")):
                begin_s = time.perf_counter()
                device.set_dirty_log(what)
                changes["the log ends" if what is None else "the log begins"].append(
                    (time.perf_counter() - begin_s) * 1000
                )
                for depth in DEPTHS:
                    reads[depth][name].append(took_us(driver, depth))
    del changes["the log ends"][0]  # there was none
    facts = {}
    for depth, series in reads.items():
        title = f"Reads of 4 KiB, {depth} at a time: for each"
        facts[title] = show(title, "us", series, against="without")
    title = "A running disk whose log begins, or ends"
    facts[title] = show(title, "ms", changes, against="the log begins")
    return facts


def serve_disk(lab):
    """QEMU's disk, behind our driver (as if it had no log) and our exporter."""
    disk = lab.work / "disk"
    disk.write_bytes(bytes(DISK_BYTES))
    words = ["qemu-storage-daemon", "--blockdev", f"driver=file,filename={disk},node-name=disk", "--export"]
    words.append(f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={lab.path('daemon.sock')}")
    daemon = lab.start(lab.peers.command(*words), "daemon.log")
    wait_for_socket(lab.work / "daemon.sock", daemon, lab)
    register(lab.work)
    lab.serve(f"unlogged:{lab.path('daemon.sock')}", "bridge.sock")


def took_us(driver, depth):
    """The median time of a round of ``depth`` reads, for each read."""
    rounds = []
    for _ in range(READS // max(depth, 4)):
        begin_s = time.perf_counter()
        for number in range(depth):
            driver.read(8 * number, BLOCK_BYTES)
        driver.queue.kick()
        done = 0
        while done < depth:
            driver.queue.wait(Deadline(10))
            done += len(driver.done())
        rounds.append((time.perf_counter() - begin_s) / depth * 1e6)
    return statistics.median(rounds)
