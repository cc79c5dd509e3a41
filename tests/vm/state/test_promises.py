"""What a kernel with device state promises beyond the requests themselves, without the driver."""

import os
import time
from contextlib import ExitStack
from pathlib import Path

from vdpabridge.abi.fuse import FUSE_FORGET_IN, FUSE_IN_HEADER, FuseOpcode
from vdpabridge.abi.vhost import VhostIoctl as Ioctl
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..raw import CANCEL, LIVE, LOAD, SETTLE_S, raw

ROUNDS = 60
PIECE = bytes(1 << 20)
#: Less than what the rounds would leave behind, more than what a machine does by itself.
SLACK_KIB = 60 << 10


def available_kib():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def test_memory_of_transfers_is_given_back(nodes):
    """Of some megabytes each: cancelled, aborted by a reset, closed with their device, outlived by their descriptor."""
    with raw(nodes[0]) as device:
        for _ in range(3):
            os.close(device.begin(LOAD))
            device.begin(CANCEL)
    before = available_kib()
    for number in range(ROUNDS):
        with raw(nodes[0]) as device:
            fd = device.begin(LOAD)
            for _ in range(4):
                os.write(fd, PIECE)
            if number % 4 == 0:
                device.begin(CANCEL)
            elif number % 4 == 1:
                device.status(0)
            elif number % 4 == 2:
                os.close(fd)
        if number % 4 != 2:
            os.close(fd)
    deadline = time.monotonic() + 10
    while before - available_kib() > SLACK_KIB:
        assert time.monotonic() < deadline, f"{before} KiB were available, and {available_kib()} are now"
        time.sleep(0.1)


def test_all_queues_are_suspended(nodes):
    """A request and a forget: neither queue does anything until the device resumes, and then both do."""
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(1 << 20))
        queues = [stack.enter_context(SplitQueue(memory, 16)) for _ in range(2)]
        device = stack.enter_context(raw(nodes[0]))
        device.negotiate()
        device.map(memory)
        for index, queue in enumerate(queues):
            device.attach(queue, index)
        device.status(LIVE)
        device.ask(Ioctl.VHOST_VDPA_SUSPEND)
        before = device.save()
        question, answer = memory.allocate(256), memory.allocate(256)
        for queue, opcode in zip(queues, (FuseOpcode.FUSE_FORGET, FuseOpcode.FUSE_GETATTR), strict=True):
            body = FUSE_FORGET_IN.pack(1)
            request = FUSE_IN_HEADER.pack(FUSE_IN_HEADER.size_bytes + len(body), opcode, 2, 1, 0, 0, 1, 0, 0) + body
            memory.slice(question, len(request))[:] = request
            queue.add([(question, len(request))], [(answer, 256)])
        asked = bytes(memory.view)
        for queue in queues:
            queue.kick()
        time.sleep(SETTLE_S)
        assert bytes(memory.view) == asked
        assert [device.base(index) for index in range(2)] == [0, 0]
        assert device.save() == before
        device.ask(Ioctl.VHOST_VDPA_RESUME)
        deadline = time.monotonic() + 10
        while [queue.device_used_index for queue in queues] != [1, 1]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
