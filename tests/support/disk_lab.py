"""A disk at work: a guest's memory and ring, requests answered and requests pending, to be moved from one to another."""

from contextlib import ExitStack, contextmanager

from vdpabridge.drivers.sim import Sim
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.snapshot import QueueEventfds
from vdpabridge.state.transfer.channel import Limits

from .pair import bridged

VERSION_1 = 1 << 32
MEMORY_BYTES = 4 << 20
DISK_BYTES = 2 << 20
BLOCKS = 70


def limits(**options):
    return Limits(Deadline(options.pop("timeout_s", 20)), **options)


@contextmanager
def made(driver, cls=Sim, size=DISK_BYTES, timeout_s=5):
    """(device, the simulated one at the end of it)."""
    with cls.blk(size, timeout_s=timeout_s) as sim:
        if driver == "sim":
            yield sim, sim
        else:
            with bridged(sim, timeout_s=timeout_s) as device:
                yield device, sim


class Lab:
    """A guest's memory and ring, and a disk that runs on it, with requests pending."""

    def __init__(self, stack, source):
        self.memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
        self.queue = stack.enter_context(SplitQueue(self.memory, 256))
        self.eventfds = {0: QueueEventfds(self.queue.kick_fd, self.queue.call_fd)}
        self.disk = KnownDisk(BlockDriver(self.memory, self.queue))
        source.map([self.memory.region])
        source.accept_features(VERSION_1)
        self.queue.attach(source, 0)
        source.start()
        for block in range(40):
            self.disk.write(block)
        self.disk.settle(self.disk.driver.drain())
        for block in range(40, BLOCKS):
            self.disk.write(block)

    def finish(self):
        """The pending requests are answered, and everything is as it ought to be."""
        self.disk.settle(self.disk.driver.drain())
        assert self.disk.verify() == BLOCKS


@contextmanager
def lab(driver, cls=Sim):
    with ExitStack() as stack:
        source, sim = stack.enter_context(made(driver, cls))
        yield source, sim, Lab(stack, source)
