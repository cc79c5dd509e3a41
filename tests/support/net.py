"""A network driver in miniature for vdpa_sim_net, which sends back what it is sent.

Source: VIRTIO 1.4 section 5.1. Queue 0 receives, 1 sends, 2 controls.
"""

from vdpabridge.abi.virtio_net import (
    VIRTIO_NET_CTRL_HDR,
    VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_HDR_V1,
)
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.deadline import Deadline

RECEIVE, SEND, CONTROL = 0, 1, 2
FRAME_BYTES = 1500
HEADER = VIRTIO_NET_HDR_V1.pack(0, 0, 0, 0, 0, 0, 0)


class NetDriver:
    """Data queues in ``memory``, the control queue in ``control_memory``."""

    def __init__(self, memory, control_memory, size=64):
        self.memory, self.control_memory = memory, control_memory
        self.receive, self.send = SplitQueue(memory, size), SplitQueue(memory, size)
        self.control = SplitQueue(control_memory, size)
        self.queues = (self.receive, self.send, self.control)
        self._buffers = {}

    def post(self, count):
        """Give the device ``count`` buffers to receive into."""
        for _ in range(count):
            address = self.memory.allocate(len(HEADER) + FRAME_BYTES)
            self._buffers[self.receive.add([], [(address, len(HEADER) + FRAME_BYTES)])] = address
        self.receive.kick()

    def transmit(self, frame):
        """Send one frame, without waiting."""
        address = self.memory.allocate(len(HEADER) + len(frame))
        self.memory.slice(address, len(HEADER) + len(frame))[:] = HEADER + frame
        self.send.add([(address, len(HEADER) + len(frame))])
        self.send.kick()

    def received(self, count, timeout_s=5.0):
        """``count`` frames, in order."""
        deadline = Deadline(timeout_s)
        frames = []
        while True:
            for head, written in self.receive.used():
                address = self._buffers.pop(head) + len(HEADER)
                frames.append(bytes(self.memory.slice(address, written - len(HEADER))))
            if len(frames) >= count:
                list(self.send.used())
                return frames
            self.receive.wait(deadline)

    def submit_mac(self, mac):
        """Ask the device to take ``mac``, without waiting."""
        command = VIRTIO_NET_CTRL_HDR.pack(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET)
        address = self.control_memory.allocate(16)
        self._answer = self.control_memory.allocate(1)
        self.control_memory.slice(address, 8)[:] = command + mac
        self.control_memory.slice(self._answer, 1)[0] = 0xFF
        self.control.add([(address, 2), (address + 2, 6)], [(self._answer, 1)])
        self.control.kick()

    def answer(self, timeout_s=5.0):
        """The byte that the device answers to the last command (0: done)."""
        deadline = Deadline(timeout_s)
        while not list(self.control.used()):
            self.control.wait(deadline)
        return self.control_memory.slice(self._answer, 1)[0]

    def set_mac(self, mac):
        """Have the device take ``mac``; its answer."""
        self.submit_mac(mac)
        return self.answer()

    def close(self):
        for queue in self.queues:
            queue.close()
