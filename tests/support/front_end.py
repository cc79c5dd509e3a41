"""A front-end that sends what it is told, right or wrong."""

import os
import socket
import struct

from vdpabridge.abi.vhost_user import FLAG_NEED_REPLY, FrontendRequest, ProtocolFeature
from vdpabridge.abi.vhost_user_payloads import U64, Region, VringAddr, VringState

F, P = FrontendRequest, ProtocolFeature
VERSION_1 = 1 << 32
PROTOCOL = 1 << 30
MEMORY_BYTES = 1 << 20
USER = 0x7F00_0000_0000
OFFERED = {
    P.MQ,
    P.LOG_SHMFD,
    P.REPLY_ACK,
    P.BACKEND_REQ,
    P.CONFIG,
    P.INFLIGHT_SHMFD,
    P.RESET_DEVICE,
    P.CONFIGURE_MEM_SLOTS,
    P.DEVICE_STATE,
    P.GET_VRING_BASE_SKIP_DRAIN,
}
ALL = sum(1 << feature for feature in OFFERED)


class FrontEnd:
    """Sends what it is told, right or wrong, and shows what comes back."""

    def __init__(self, ours, sim):
        self.socket = ours
        self.sim = sim
        ours.settimeout(5)

    def kick(self, index=0):
        """Kick a ring that is at work, by another eventfd than before."""
        event = os.eventfd(1, os.EFD_CLOEXEC)
        assert self.tell(F.SET_VRING_KICK, U64(index).pack(), [event]) == 0
        os.close(event)

    def send(self, request, payload=b"", fds=(), *, flags=1, size=None):
        head = struct.pack("=III", request, flags, len(payload) if size is None else size)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        self.socket.sendmsg([head + payload], ancillary)

    def receive(self):
        """(request, flags, payload, descriptors), or None where the back-end has hung up."""
        try:
            head, ancillary, _, _ = self.socket.recvmsg(12, 256)
        except ConnectionResetError:
            return None
        if not head:
            return None
        fds = [fd for _, _, content in ancillary for fd in struct.unpack(f"={len(content) // 4}i", content)]
        request, flags, size = struct.unpack("=III", head)
        return request, flags, self.socket.recv(size, socket.MSG_WAITALL) if size else b"", fds

    def ask(self, request, payload=b"", fds=()):
        """The payload of a reply that is as QEMU wants it."""
        self.send(request, payload, fds)
        answer = self.receive()
        assert answer is not None, "the back-end hung up"
        assert answer[:2] == (request, 5)
        assert not answer[3]
        return answer[2]

    def number(self, request, payload=b"", fds=()):
        return struct.unpack("=Q", self.ask(request, payload, fds))[0]

    def tell(self, request, payload=b"", fds=()):
        """The acknowledgement of a request, asked for."""
        self.send(request, payload, fds, flags=1 | FLAG_NEED_REPLY)
        answer = self.receive()
        assert answer is not None, "the back-end hung up"
        assert answer[:2] == (request, 5)
        return struct.unpack("=Q", answer[2])[0]

    def negotiate(self, protocol_features=ALL, features=VERSION_1 | PROTOCOL):
        self.send(F.SET_PROTOCOL_FEATURES, U64(protocol_features).pack())
        if features is not None:
            self.send(F.SET_FEATURES, U64(features).pack())
        return self

    def is_alive(self):
        """Whether the back-end still answers."""
        try:
            self.send(F.GET_FEATURES)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return self.receive() is not None


def one_region(count=1):
    return tuple(Region(0x1000_0000 * (n + 1), MEMORY_BYTES, USER * (n + 1), 0) for n in range(count))


def ring(front, index=0, *, kick=True, enable=True, place=None, base=0):
    """Set a ring up as QEMU does: KICK before ENABLE."""
    place = USER + 0x10000 * index if place is None else place
    front.send(F.SET_VRING_NUM, VringState(index, 64).pack())
    front.send(F.SET_VRING_BASE, VringState(index, base).pack())
    front.send(F.SET_VRING_ADDR, VringAddr(index, 0, place, place + 0x2000, place + 0x1000, 0).pack())
    event = os.eventfd(0, os.EFD_CLOEXEC)
    if kick:
        front.send(F.SET_VRING_KICK, U64(index).pack(), [event])
    front.send(F.SET_VRING_CALL, U64(index).pack(), [event])
    os.close(event)
    if enable:
        assert front.tell(F.SET_VRING_ENABLE, VringState(index, 1).pack()) == 0
