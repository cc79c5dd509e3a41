"""A process that goes through suspend and restore up to a named step, says so, and waits to be killed.

``python3 -m tests.support.victim STEP NODE NODE``
"""

import sys
import time

from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.replay import resume
from vdpabridge.state.snapshot import QueueEventfds, capture, restore

STEPS = (
    "opened",
    "mapped",
    "configured",
    "attached",
    "started",
    "busy",
    "suspended",
    "pending",
    "resumed",
    "suspended again",
    "captured",
    "second opened",
    "second mapped",
    "second features accepted",
    "second queue set up",
    "second base set",
    "second eventfds set",
    "second enabled",
    "second started",
    "first reset for a replay",
    "first replayed",
    "in a batch of mappings",
)


def steps(source_node, destination_node):
    """Yields after each step, in the order of STEPS."""
    memory = GuestMemory(4 << 20)
    queue = SplitQueue(memory, 256)
    disk = KnownDisk(BlockDriver(memory, queue))
    source = VhostVdpa.open(source_node)
    yield
    source.map([memory.region])
    yield
    source.accept_features(1 << 32)
    yield
    queue.attach(source, 0)
    yield
    source.start()
    yield
    for block in range(80):
        disk.write(block)
    queue.kick()
    yield
    source.suspend()
    yield
    disk.driver.done()
    if disk.driver.capacity > disk.driver.inflight:
        disk.write(100)
        queue.kick()
    yield
    resume(source)
    yield
    source.suspend()
    yield
    snapshot = capture(source)
    yield
    destination = VhostVdpa.open(destination_node)
    yield
    destination.map([memory.region])
    yield
    # restore(), step by step
    carried = snapshot.queues[0]
    destination.accept_features(snapshot.features)
    yield
    destination.set_queue(0, carried.setup)
    yield
    destination.set_base(0, carried.base)
    yield
    destination.set_call(0, queue.call_fd)
    destination.set_kick(0, queue.kick_fd)
    yield
    destination.enable_queue(0)
    yield
    destination.start()
    yield
    source.reset()
    yield
    restore(source, snapshot, {0: QueueEventfds(queue.kick_fd, queue.call_fd)})
    source.start()
    yield
    with destination.iotlb.batch():
        yield


def main():
    target, source_node, destination_node = sys.argv[1:]
    for step, _ in zip(STEPS, steps(source_node, destination_node), strict=True):
        if step == target:
            print("there", flush=True)
            time.sleep(600)


if __name__ == "__main__":
    main()
