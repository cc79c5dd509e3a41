"""What a front-end knows of a back-end stays true, whatever comes between a request and its reply."""

import itertools
import os
import time
from contextlib import contextmanager

import pytest

from vdpabridge.abi.vhost_user import FrontendRequest as F, ProtocolFeature as P
from vdpabridge.abi.vhost_user_payloads import U64, VringState
from vdpabridge.device import MemoryRegion, QueueSetup, RunState, SplitBase
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import DeadlineExceeded, DeviceFailed, PeerRefused
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.vhost_user.connection import Connection

from ..support.pair import bridged
from ..support.scripted import FULL, VERSION_1, scripted

QUEUES = 2


@contextmanager
def connected(offers=FULL, *, timeout_s=5, **options):
    with (
        scripted(offers) as (back_end, ours),
        VhostUser(Connection(ours, "the back-end"), device_id=2, timeout_s=timeout_s, **options) as device,
    ):
        yield back_end, device


@contextmanager
def running(offers=FULL, *, timeout_s=5):
    with connected(offers, timeout_s=timeout_s) as (back_end, device), GuestMemory(1 << 20) as memory:
        device.map([memory.region])
        device.accept_features(VERSION_1)
        for index in range(QUEUES):
            kick = os.eventfd(0, os.EFD_CLOEXEC)
            device.set_queue(index, QueueSetup(64, memory.allocate(4096), memory.allocate(4096), memory.allocate(4096)))
            device.set_base(index, SplitBase(3))
            device.set_kick(index, kick)
            device.enable_queue(index)
            os.close(kick)
        device.start()
        yield back_end, device


class Disturbed:
    """A poll object whose ``at``-th wait is ended by an exception of a signal's handler."""

    def __init__(self, poll, exception):
        self.inner = poll
        self.exception = exception
        self.at = None
        self.calls = 0

    def poll(self, timeout):
        self.calls += 1
        if self.calls == self.at:
            raise self.exception
        return self.inner.poll(timeout)


OPERATIONS = {
    "enable": lambda device: device.enable_queue(0, False),
    "call": lambda device: device.set_call(0, None),
    "suspend": lambda device: device.suspend(),
    "read config": lambda device: device.read_config(0, 8),
    "stop a queue": lambda device: device.stop_queue(1),
    "in-flight region": lambda device: device.suspend() or os.close(device.get_inflight(1, 64).fd),
}


def sevens(message):
    head, data = message.payload[:12], message.payload[12:]
    return [(F.GET_CONFIG, 5, head + b"7" * len(data), ())]


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), ZeroDivisionError("of a handler")], ids=["Ctrl-C", "other"])
@pytest.mark.parametrize("offers", [FULL, FULL - {P.REPLY_ACK}], ids=["acknowledged", "without"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_exception_before_any_reply(operation, offers, exception):
    """Enumerated: before each reply of the operation. The next request gets its own reply, and the device is well."""
    for at in itertools.count(1):
        with running(offers) as (back_end, device):
            connection = device._requests.connection
            connection._readable = disturbed = Disturbed(connection._readable, exception)
            disturbed.at = at
            try:
                OPERATIONS[operation](device)
                disturbed.at = None
                assert at > 1
                return
            except type(exception):
                disturbed.at = None
            back_end.answers[F.GET_CONFIG] = sevens
            assert device.read_config(0, 4) == b"7777"
            if device.state is RunState.RUNNING:
                device.suspend()
            assert device.state is RunState.SUSPENDED
            assert [device.get_base(index) for index in range(QUEUES)] == [SplitBase(7), SplitBase(7)]
            device.resume()


def test_an_exception_when_a_message_is_half_sent():
    """Whether it went is not known: the device has failed, and says why. It is not guessed."""
    with running() as (_, device):
        real = device._requests.connection._socket

        class Socket:
            def sendmsg(self, *words):
                real.sendmsg(*words)
                raise KeyboardInterrupt

            def __getattr__(self, name):
                return getattr(real, name)

        device._requests.connection._socket = Socket()
        with pytest.raises(KeyboardInterrupt):
            device.enable_queue(0, False)
        device._requests.connection._socket = real
        with pytest.raises(DeviceFailed, match="interrupted in the middle of a message"):
            device.enable_queue(0, True)
        assert device.state is RunState.FAILED


def test_a_ring_that_stops_too_late_is_not_forgotten():
    """GET_VRING_BASE lasts as long as the device's work; what is asked meanwhile takes its answer in."""
    with running(timeout_s=0.3) as (back_end, device):
        held = []
        back_end.answers[F.GET_VRING_BASE] = lambda message: (
            held.append(VringState.unpack(message.payload).index),
            [],
        )[1]
        with pytest.raises(DeadlineExceeded):
            device.suspend()
        assert (device.state, held) == (RunState.RUNNING, [0])
        del back_end.answers[F.GET_VRING_BASE]
        back_end.connection.send(F.GET_VRING_BASE, VringState(0, 40).pack(), flags=5)
        device.enable_queue(1, True)
        device.suspend()
        assert [device.get_base(index) for index in range(QUEUES)] == [SplitBase(40), SplitBase(7)]


@pytest.mark.parametrize("refused", [F.SET_VRING_NUM, F.SET_VRING_BASE, F.SET_VRING_ADDR, F.SET_VRING_CALL])
def test_nothing_is_kicked_where_it_was_not_accepted(refused):
    """A ring that does not know where it stands would process requests for the second time."""
    with running() as (back_end, device):
        device.suspend()
        since = len(back_end.log)
        back_end.answers[refused] = lambda message: [(message.request, 5, U64(1).pack(), ())]
        with pytest.raises(PeerRefused):
            device.resume()
        assert device.state is RunState.SUSPENDED
        assert F.SET_VRING_KICK.name not in back_end.names(since)
        del back_end.answers[refused]
        device.resume()


def test_where_rings_stand_after_a_kick_was_refused():
    """The other may have been at work: only the back-end knows."""
    with running() as (back_end, device):
        device.suspend()
        refuse = lambda message: [(message.request, 5, U64(message.payload[0]).pack(), ())]  # noqa: E731
        back_end.answers[F.SET_VRING_KICK] = refuse
        back_end.answers[F.GET_VRING_BASE] = lambda message: [
            (F.GET_VRING_BASE, 5, VringState(VringState.unpack(message.payload).index, 9).pack(), ())
        ]
        with pytest.raises(PeerRefused):
            device.resume()
        assert device.state is RunState.SUSPENDED
        assert [device.get_base(index) for index in range(QUEUES)] == [SplitBase(9), SplitBase(9)]


def test_an_operation_has_one_deadline():
    """Each message is answered just in time, and all of them together are not."""

    def slow(message):
        time.sleep(0.15)
        return [(message.request, 5, U64(0).pack(), ())]

    with connected() as (back_end, device), GuestMemory(1 << 20) as memory:
        begin = memory.guest_address
        parts = [MemoryRegion(begin + at, 4096, memory.fileno(), at) for at in range(0, 20 * 4096, 4096)]
        back_end.answers[F.ADD_MEM_REG] = slow
        device.timeout_s = 0.4
        with pytest.raises(DeadlineExceeded):
            device.map(parts)
        assert back_end.names().count("ADD_MEM_REG") < 10


def test_a_back_end_that_claims_endless_queues():
    with connected() as (back_end, device):
        assert device.identity.queue_count == 2
    with scripted(FULL) as (back_end, ours):
        back_end.answers[F.GET_QUEUE_NUM] = lambda _message: [(F.GET_QUEUE_NUM, 5, U64((1 << 64) - 1).pack(), ())]
        with VhostUser(Connection(ours, "the back-end"), device_id=2, timeout_s=5) as device:
            assert device.identity.queue_count == 256
            device.accept_features(VERSION_1)
            with pytest.raises(ValueError, match="no queue 256"):
                device.enable_queue(256)


@pytest.mark.parametrize("window", ["acknowledged", "without"])
def test_two_hundred_and_fifty_six_queues(window):
    """More than both sockets hold: whoever does not read what comes back waits for ever."""
    with Sim.blk(1 << 20, queue_count=256, timeout_s=20) as sim, bridged(sim, timeout_s=20) as device:
        if window == "without":
            device._requests.protocol_features &= ~(1 << P.REPLY_ACK)
        with GuestMemory(4 << 20) as memory:
            queues = [SplitQueue(memory, 16) for _ in range(256)]
            device.map([memory.region])
            device.accept_features(VERSION_1)
            for index, queue in enumerate(queues):
                queue.attach(device, index)
            device.start()
            device.suspend()
            device.resume()
            assert sim.state is RunState.RUNNING
            for queue in queues:
                queue.close()
