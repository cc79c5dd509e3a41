"""A guest with a file open on a file server."""

from vdpabridge.guest.fuse import FuseDriver
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.snapshot import QueueEventfds

ROOT = 1


class Mount:
    def __init__(self, stack, device):
        self.memory = stack.enter_context(GuestMemory(1 << 20))
        self.rings = [stack.enter_context(SplitQueue(self.memory, 64)) for _ in range(2)]
        self.eventfds = {index: QueueEventfds(ring.kick_fd, ring.call_fd) for index, ring in enumerate(self.rings)}
        self.fuse = FuseDriver(self.memory, *self.rings, timeout_s=10)
        self.device = device
        self.start(device)
        self.fuse.init()
        self.nodeid = self.fuse.lookup(ROOT, "README").nodeid
        self.handle = self.fuse.open(self.nodeid)

    def start(self, device, bases=(0, 0)):
        device.map([self.memory.region])
        device.accept_features(1 << 32)
        for index, ring in enumerate(self.rings):
            ring.attach(device, index, bases[index])
        device.start()

    def read(self):
        return self.fuse.read(self.nodeid, self.handle, 0, 5)
