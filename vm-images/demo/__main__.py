"""A device's work goes on in another: suspend a simulated disk under load, and let a second one finish.

Runs as root on a kernel with vdpa_sim_blk and a RAM disk that all simulated disks share
(``vdpa_sim_blk.shared_backend=1``). Ends with ``demo: PASS`` or ``demo: FAIL: why``.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

from vdpabridge.bus import Bus
from vdpabridge.bus.netlink import VdpaNetlink
from vdpabridge.cli.timeline import Broken, Timeline, require
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import VdpaBridgeError
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.replay import resume
from vdpabridge.state.snapshot import QueueEventfds, capture, restore

MEMORY_BYTES = 8 << 20
QUEUE_SIZE = 256
BLOCKS = 500
PENDING = 60
#: For the simulator to end its look after the last kick: it would find what is submitted meanwhile.
SETTLE_S = 0.03
#: Long enough for the simulator to do hundreds of requests, were it running.
LOOK_S = 0.1


def make_disk(name: str) -> str:
    """The node of a new simulated disk."""
    with VdpaNetlink() as netlink:
        netlink.add(name, "vdpasim_blk")
    node = Bus().bind(name, "vhost_vdpa").node
    require(node is not None, f"{name} has no node")
    return str(node)


def demonstrate(timeline: Timeline) -> None:
    """The whole story."""
    with timeline.step("make two simulated disks over one RAM disk") as facts:
        source_node, destination_node = make_disk("source"), make_disk("destination")
        facts += [source_node, destination_node]
    with (
        GuestMemory(MEMORY_BYTES) as memory,
        SplitQueue(memory, QUEUE_SIZE) as queue,
        VhostVdpa.open(source_node, timeout_s=30) as source,
        VhostVdpa.open(destination_node, timeout_s=30) as destination,
    ):
        disk = KnownDisk(BlockDriver(memory, queue))
        with timeline.step("start the source") as facts:
            source.map([memory.region])
            source.accept_features(1 << 32)
            queue.attach(source, 0)
            source.start()
            facts.append("capabilities " + " ".join(sorted(each.value for each in source.capabilities)))
        with timeline.step("write through the source") as facts:
            write(disk, range(BLOCKS))
            facts.append(f"{disk.writes_confirmed} blocks of 4 KiB")
        with timeline.step("read them back") as facts:
            facts.append(f"{disk.verify()} blocks verified")
        submit(timeline, disk)
        with timeline.step("SUSPEND the source, as before a migration that then fails"):
            source.suspend()
        wait_in_vain(timeline, disk)
        with timeline.step("go on in the source") as facts:
            facts.append("by RESUME" if resume(source) else "by reset and replay: this kernel has no RESUME")
            disk.settle(disk.driver.drain())
        hand_over(timeline, disk, memory, source, destination)
        with timeline.step("read everything back through the destination") as facts:
            facts.append(f"{disk.verify()} blocks verified")


def hand_over(
    timeline: Timeline, disk: KnownDisk, memory: GuestMemory, source: VhostVdpa, destination: VhostVdpa
) -> None:
    """Suspend the source, carry its queue state, start the destination; the ring stays where it is."""
    queue = disk.driver.queue
    submit(timeline, disk)
    begin_s = time.monotonic()
    with timeline.step("SUSPEND the source"):
        source.suspend()
    wait_in_vain(timeline, disk)
    with timeline.step("save the queue state") as facts:
        snapshot = capture(source)
        facts.append(f"queue 0 at {snapshot.queues[0].base}, features {snapshot.features:#x}")
    with timeline.step("load it on the destination"):
        destination.map([memory.region])
        restore(destination, snapshot, {0: QueueEventfds(queue.kick_fd, queue.call_fd)})
    with timeline.step("start the destination"):
        destination.start()
    with timeline.step("the pending requests complete there") as facts:
        finished = disk.driver.drain()
        disk.settle(finished)
        require(len(finished) == PENDING, f"{len(finished)} of {PENDING} requests came back")
        stopped_ms = (time.monotonic() - begin_s - LOOK_S) * 1000
        facts.append(f"{len(finished)} done, {stopped_ms:.0f} ms after SUSPEND but for the looking")


def submit(timeline: Timeline, disk: KnownDisk) -> None:
    """Make requests available to a running device, and hold the kick back so that they are pending."""
    with timeline.step("submit requests, not kicked yet") as facts:
        time.sleep(SETTLE_S)
        for block in range(PENDING):
            disk.write(block)
        facts.append(f"{PENDING} writes")


def wait_in_vain(timeline: Timeline, disk: KnownDisk) -> None:
    """Kick a suspended device, more than once, and see that it does nothing."""
    queue = disk.driver.queue
    with timeline.step("kick: nothing may happen") as facts:
        before = queue.device_used_index
        for _ in range(3):
            queue.kick()
            time.sleep(LOOK_S / 3)
        require(queue.device_used_index == before, "the suspended device used a buffer")
        pending = (queue.avail_index - before) & 0xFFFF
        require(pending == PENDING, f"{PENDING - pending} requests were done before SUSPEND: nothing is shown")
        facts.append(f"{pending} requests pending, used index still {before}")


def write(disk: KnownDisk, blocks: range) -> None:
    """Write ``blocks``, as many at a time as fit."""
    for first in range(blocks.start, blocks.stop, disk.driver.capacity):
        for block in range(first, min(first + disk.driver.capacity, blocks.stop)):
            disk.write(block)
        disk.settle(disk.driver.drain())


def main() -> int:
    """0 and ``demo: PASS``, or 1 and ``demo: FAIL: why``."""
    print(f"vdpabridge demo on Linux {os.uname().release}")
    try:
        demonstrate(Timeline())
    except (Broken, VdpaBridgeError) as error:
        print(f"demo: FAIL: {error}")
        return 1
    except Exception as error:  # noqa: BLE001  # whatever it is, the last line says what became of the demo
        traceback.print_exc()
        print(f"demo: FAIL: {type(error).__name__}: {error}")
        return 1
    print("demo: PASS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
