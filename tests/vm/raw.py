"""vhost-vdpa's requests with nothing between: no driver, and none of its precautions, which would hide a kernel's mistake."""

import fcntl
import os
import select
import struct
from contextlib import ExitStack, contextmanager, suppress

import pytest

from vdpabridge.abi.vhost import VHOST_MSG_V2_LAYOUT, VHOST_VRING_ADDR, VHOST_VRING_FILE, VhostIoctl as Ioctl
from vdpabridge.guest.block import BlockDriver
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.deadline import Deadline

from .conftest import MEMORY_BYTES

SAVE, LOAD, CANCEL = 0, 1, 2
STOPPED = 0
ACKNOWLEDGE, READY, NEGOTIATED, LIVE = 1, 3, 0xB, 0xF
VERSION_1_AND_ACCESS_PLATFORM = 3 << 32
UPDATE, INVALIDATE, BATCH_BEGIN, BATCH_END = 2, 3, 5, 6
READ_WRITE = 3
SETTLE_S = 0.05
NAME = b"vdpa_blk_sim"


class Raw:
    """An open node, and nothing but its requests."""

    def __init__(self, node, *, owner=True):
        self.fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        if owner:
            self.ask(Ioctl.VHOST_SET_OWNER)

    def ask(self, request, argument=0):
        return fcntl.ioctl(self.fd, request, argument)

    def status(self, status):
        self.ask(Ioctl.VHOST_VDPA_SET_STATUS, bytearray([status]))

    def begin(self, direction, phase=STOPPED, fd=-1, flags=0):
        argument = bytearray(struct.pack("=IIiI", direction, phase, fd, flags))
        self.ask(Ioctl.VHOST_VDPA_SET_DEVICE_STATE_FD, argument)
        answer = struct.unpack("=IIiI", argument)
        assert answer[:2] + answer[3:] == (direction, phase, flags)
        return answer[2]

    def check(self):
        return self.ask(Ioctl.VHOST_VDPA_CHECK_DEVICE_STATE)

    def negotiate(self):
        self.status(0)
        self.status(ACKNOWLEDGE)
        self.status(READY)
        self.ask(Ioctl.VHOST_SET_FEATURES, bytearray(struct.pack("=Q", VERSION_1_AND_ACCESS_PLATFORM)))
        self.status(NEGOTIATED)

    def run(self):
        self.negotiate()
        self.status(LIVE)

    def suspend(self):
        self.run()
        self.ask(Ioctl.VHOST_VDPA_SUSPEND)

    def message(self, kind, iova=0, size=0, address=0):
        """Write one IOTLB message."""
        os.write(self.fd, VHOST_MSG_V2_LAYOUT.pack(2, 0, iova, size, address, READ_WRITE, kind))

    def map(self, memory):
        """Give the device all of a `GuestMemory`, at its guest address."""
        region = memory.region
        self.message(UPDATE, region.guest_address, region.size_bytes, memory.mapping.address)

    def of_queue(self, request, index, number=0):
        """A request about a queue that carries, or answers, a number."""
        argument = bytearray(struct.pack("=II", index, number))
        self.ask(request, argument)
        return struct.unpack("=II", argument)[1]

    def base(self, index):
        return self.of_queue(Ioctl.VHOST_GET_VRING_BASE, index)

    def attach(self, queue, index, base=0):
        """Set queue ``index`` up with a `SplitQueue`, and enable it."""
        setup = queue.setup
        self.of_queue(Ioctl.VHOST_SET_VRING_NUM, index, setup.size)
        addresses = (setup.desc_address, setup.used_address, setup.avail_address)
        self.ask(Ioctl.VHOST_SET_VRING_ADDR, VHOST_VRING_ADDR.buffer(index, 0, *addresses, 0))
        self.of_queue(Ioctl.VHOST_SET_VRING_BASE, index, base)
        self.ask(Ioctl.VHOST_SET_VRING_CALL, VHOST_VRING_FILE.buffer(index, queue.call_fd))
        self.ask(Ioctl.VHOST_SET_VRING_KICK, VHOST_VRING_FILE.buffer(index, queue.kick_fd))
        self.of_queue(Ioctl.VHOST_VDPA_SET_VRING_ENABLE, index, 1)

    def save(self):
        """The whole state, checked."""
        fd = self.begin(SAVE)
        with open(fd, "rb") as file:
            state = file.read()
        assert self.check() == 0
        return state

    def load(self, state):
        """Write ``state`` and close; the caller checks."""
        fd = self.begin(LOAD)
        with open(fd, "wb", buffering=0) as file:
            file.write(state)


@contextmanager
def raw(node, **options):
    device = Raw(node, **options)
    try:
        yield device
    finally:
        os.close(device.fd)


@contextmanager
def refuses(code):
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code


def backend_features(device):
    buffer = bytearray(8)
    device.ask(Ioctl.VHOST_GET_BACKEND_FEATURES, buffer)
    return struct.unpack("=Q", buffer)[0]


class RawDisk:
    """A running disk: its requests, its guest's memory and its ring."""

    def __init__(self, stack, node, size=64):
        self.memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
        self.queue = stack.enter_context(SplitQueue(self.memory, size))
        self.device = stack.enter_context(raw(node))
        self.driver = BlockDriver(self.memory, self.queue)
        self._mapped = False
        self.start()

    def start(self, base=0):
        self.device.negotiate()
        # the reset in that takes the device its memory, if IOTLB_PERSIST was not accepted, and vhost does not notice
        if self._mapped:
            self.unmap()
        self.device.map(self.memory)
        self._mapped = True
        self.device.attach(self.queue, 0, base)
        self.device.status(LIVE)

    def suspend(self):
        self.device.ask(Ioctl.VHOST_VDPA_SUSPEND)

    def resume(self):
        self.device.ask(Ioctl.VHOST_VDPA_RESUME)

    def unmap(self):
        region = self.memory.region
        self.device.message(INVALIDATE, region.guest_address, region.size_bytes)

    def requests(self, count):
        for _ in range(count):
            self.driver.get_id()

    def answers(self, count, *, within_s=10):
        """Wait for ``count`` answers, without a kick."""
        deadline = Deadline(within_s)
        done = self.driver.done()
        while len(done) < count:
            self.queue.wait(deadline)
            done += self.driver.done()
        assert [request.data[: len(NAME)] for request in done] == [NAME] * count

    def do(self, count=5):
        self.requests(count)
        self.queue.kick()
        self.answers(count)

    def take_calls(self):
        """Forget the calls that came so far."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.queue.call_fd)

    @property
    def was_called(self):
        poll = select.poll()
        poll.register(self.queue.call_fd, select.POLLIN)
        return bool(poll.poll(SETTLE_S * 1000))


@contextmanager
def running_raw(node):
    with ExitStack() as stack:
        yield RawDisk(stack, node)
