"""A back-end that keeps to a script: right by default, wrong where a test says so, and it remembers what it was told."""

import os
import socket
import struct
import threading
from contextlib import contextmanager

from vdpabridge.abi.vhost_user import FrontendRequest, ProtocolFeature
from vdpabridge.abi.vhost_user_payloads import U64, Inflight, VringState
from vdpabridge.abi.vhost_user_table import FRONTEND_REQUESTS
from vdpabridge.errors import ProtocolError
from vdpabridge.vhost_user.connection import Connection

F, P = FrontendRequest, ProtocolFeature
VERSION_1, PROTOCOL, LOG_ALL = 1 << 32, 1 << 30, 1 << 26
#: What peers offer, as their sources have it.
VIRTIOFSD = {
    P.MQ,
    P.BACKEND_REQ,
    P.BACKEND_SEND_FD,
    P.REPLY_ACK,
    P.CONFIGURE_MEM_SLOTS,
    P.LOG_SHMFD,
    P.DEVICE_STATE,
    P.RESET_DEVICE,
}
PASST = {P.REPLY_ACK, P.LOG_SHMFD, P.DEVICE_STATE, P.RARP}
DPDK = {P.MQ, P.LOG_SHMFD, P.REPLY_ACK, P.BACKEND_REQ, P.CONFIG, P.INFLIGHT_SHMFD, P.STATUS}
FULL = set(P) - {P.XEN_MMAP, P.STATUS}


class ScriptedBackEnd:
    """``answers`` maps a request to a function of the message: what to send instead of the right reply.

    It returns a list of (request, flags, payload, descriptors); an empty one for silence, None to hang up.
    """

    def __init__(self, connection, offers, features):
        self.connection = connection
        self.offers = sum(1 << feature for feature in offers)
        self.features = features
        self.answers = {}
        self.log = []
        """(request, payload, number of descriptors) of every message."""
        self.status = 0

    def names(self, since=0):
        return [request.name for request, _, _ in self.log[since:]]

    def run(self):
        try:
            while (message := self.connection.receive()) is not None:
                with message:
                    request = F(message.request)
                    self.log.append((request, message.payload, message.fd_count))
                    replies = self.answers.get(request, self.right)(message)
                    if replies is None:
                        return
                    for each, flags, payload, fds in replies:
                        self.connection.send(each, payload, fds, flags=flags)
        except (ProtocolError, TimeoutError):
            return
        finally:
            self.connection.close()

    def right(self, message):
        request = F(message.request)
        numbers = {
            F.GET_FEATURES: self.features,
            F.GET_PROTOCOL_FEATURES: self.offers,
            F.GET_QUEUE_NUM: 2,
            F.GET_MAX_MEM_SLOTS: 32,
            F.GET_STATUS: self.status,
            F.SET_DEVICE_STATE_FD: 0x100,
            F.CHECK_DEVICE_STATE: 0,
        }
        if request is F.SET_STATUS:
            self.status = struct.unpack("=Q", message.payload)[0]
        if request in numbers:
            return [(request, 5, U64(numbers[request]).pack(), ())]
        if request in (F.GET_VRING_BASE, F.GET_VRING_BASE_SKIP_DRAIN):
            return [(request, 5, VringState(VringState.unpack(message.payload).index, 7).pack(), ())]
        if request is F.GET_INFLIGHT_FD:
            fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
            self.to_close = fd
            return [(request, 5, Inflight(4096, 0, 2, 64).pack(), (fd,))]
        if FRONTEND_REQUESTS[request].reply is not None:
            return [(request, 5, message.payload, ())]
        return [(request, 5, bytes(8), ())] if message.flags & 8 else []


@contextmanager
def scripted(offers=FULL, features=VERSION_1 | PROTOCOL | LOG_ALL, *, timeout_s=20):
    """(back-end, our end of its socket). The back-end ends where nobody says anything for ``timeout_s``."""
    ours, theirs = socket.socketpair()
    back_end = ScriptedBackEnd(Connection(theirs, "the test", timeout_s=timeout_s), offers, features)
    thread = threading.Thread(target=back_end.run)
    thread.start()
    try:
        yield back_end, ours
    finally:
        ours.close()
        thread.join()
        if hasattr(back_end, "to_close"):
            os.close(back_end.to_close)
