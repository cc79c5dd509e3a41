"""A front-end gone mad: messages made of bytes that somebody else chose. For hypothesis and for the fuzzer."""

import os
import socket
import struct
from contextlib import suppress

from vdpabridge.abi.vhost_user import FrontendRequest
from vdpabridge.device import RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import DeadlineExceeded, ProtocolError
from vdpabridge.export.vhost_user import Session
from vdpabridge.vhost_user.connection import Connection

REQUESTS = list(FrontendRequest)
MEMORY_BYTES = 1 << 16
USER = 0x7F00_0000_0000
_EVERYTHING = struct.pack("=Q", sum(1 << bit for bit in (0, 1, 3, 5, 9, 12, 13, 15, 19, 23)))
_FEATURES = struct.pack("=Q", 1 << 32 | 1 << 30)
_SMALL = (0, 1, 2, 63, 64, 255, 256, 4096, 0x8000, 0xFFFF, 1 << 32, 1 << 63, USER, USER + 4096, 0x1000, 0x10000)


class Bytes:
    """Numbers out of ``data``, zeros when it is at its end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    @property
    def left(self):
        return self.at < len(self.data)

    def byte(self):
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def take(self, size):
        return bytes(self.byte() for _ in range(size))


def payload_of(request, source):
    """A payload that is nearly right: of the right size, of numbers that may mean something."""
    from vdpabridge.abi.vhost_user_table import FRONTEND_REQUESTS

    kind = FRONTEND_REQUESTS[request].payload
    layout = getattr(kind, "LAYOUT", None)
    size = layout.size_bytes if layout else 8
    if request is FrontendRequest.SET_MEM_TABLE:
        count = source.byte() % 3
        return struct.pack("=II", count, 0) + b"".join(region(source) for _ in range(count)), count
    if request in (FrontendRequest.ADD_MEM_REG, FrontendRequest.REM_MEM_REG):
        return bytes(8) + region(source), 1
    if request in (FrontendRequest.GET_CONFIG, FrontendRequest.SET_CONFIG):
        length = source.byte() % 100
        return struct.pack("=III", source.byte(), length, source.byte() % 3) + source.take(length), 0
    words = b"".join(struct.pack("=Q", _SMALL[source.byte() % len(_SMALL)]) for _ in range(-(-size // 8)))
    if layout and layout.fields and layout.offsets.get(layout.fields[0]) == 0 and size == 8 and len(layout.fields) == 2:
        words = struct.pack("=II", source.byte() % 3, _SMALL[source.byte() % len(_SMALL)] & 0xFFFFFFFF)
    return words[:size], FRONTEND_REQUESTS[request].fds[1]


def region(source):
    return struct.pack(
        "=4Q",
        (source.byte() % 4) * 0x10000,
        _SMALL[source.byte() % len(_SMALL)] if source.byte() % 4 == 0 else MEMORY_BYTES,
        USER + (source.byte() % 4) * 0x10000,
        4096 * (source.byte() % 2),
    )


def message_of(source):
    """(bytes, how many descriptors go with them)."""
    style = source.byte()
    request = REQUESTS[source.byte() % len(REQUESTS)]
    flags = 1 | (8 if style & 1 else 0)
    payload, count = payload_of(request, source)
    if style & 0xF0 == 0xF0:
        payload, count = source.take(source.byte() % 64), source.byte() % 4
    if style & 0xE == 0xE:
        flags = source.byte()
    return struct.pack("=III", request, flags, len(payload)) + payload, count % 33


def drive(data):
    """Play ``data`` against our exporter; an exception that comes out of here is a mistake of ours."""
    source = Bytes(data)
    ours, theirs = socket.socketpair()
    with ours, Sim.blk(1 << 16, timeout_s=0.05) as sim:
        ours.setblocking(False)
        session = Session(sim, Connection(theirs, "the fuzzer", timeout_s=0.2), report=lambda _text: None)
        with session:
            with suppress(BlockingIOError, BrokenPipeError):
                ours.send(struct.pack("=III", FrontendRequest.SET_PROTOCOL_FEATURES, 1, 8) + _EVERYTHING)
                session.serve_one()
            if source.byte() & 1:
                start(ours, session)
                assert sim.state is RunState.RUNNING
            while source.left:
                message, count = message_of(source)
                if not exchange(ours, session, message, descriptors(count, source)):
                    break
        assert sim.state is not RunState.RUNNING
        assert not sim.regions


def start(ours, session):
    """Set a ring up, and start it."""
    memory = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    os.ftruncate(memory, MEMORY_BYTES)
    kick = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    steps = [
        (FrontendRequest.SET_FEATURES, _FEATURES, []),
        (FrontendRequest.SET_MEM_TABLE, struct.pack("=II4Q", 1, 0, 0, MEMORY_BYTES, USER, 0), [memory]),
        (FrontendRequest.SET_VRING_NUM, struct.pack("=II", 0, 64), []),
        (FrontendRequest.SET_VRING_ADDR, struct.pack("=II4Q", 0, 0, USER, USER + 0x2000, USER + 0x1000, 0), []),
        (FrontendRequest.SET_VRING_KICK, bytes(8), [kick]),
        (FrontendRequest.SET_VRING_ENABLE, struct.pack("=II", 0, 1), []),
    ]
    for request, payload, fds in steps:
        message = struct.pack("=III", request, 1, len(payload)) + payload
        assert exchange(ours, session, message, [os.dup(fd) for fd in fds])
    os.close(memory)
    os.close(kick)


def descriptors(count, source):
    made = []
    for _ in range(count):
        kind = source.byte() % 4
        if kind == 0:
            made.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        elif kind == 1:
            ends = os.pipe()
            made.append(ends[source.byte() % 2])
            os.close(ends[0] if made[-1] == ends[1] else ends[1])
        else:
            made.append(os.memfd_create("fuzz", os.MFD_CLOEXEC))
            os.ftruncate(made[-1], MEMORY_BYTES * 2)
    return made


def exchange(ours, session, message, fds):
    """One message, and what comes back; False where the connection is over."""
    try:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        ours.sendmsg([message], ancillary)
        alive = session.serve_one()
    except (ProtocolError, DeadlineExceeded, BrokenPipeError):
        alive = False
    finally:
        for fd in fds:
            os.close(fd)
    with suppress(BlockingIOError, ConnectionResetError):
        while True:
            answer, received, _, _ = ours.recvmsg(8192, 256)
            for _, _, content in received:
                for fd in struct.unpack(f"={len(content) // 4}i", content):
                    os.close(fd)
            if not answer:
                break
    return alive
