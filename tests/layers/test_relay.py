"""The thread between a guest and a device: whose eventfds it reads and writes, and when it holds requests back."""

import os
import select
import threading
from contextlib import contextmanager, suppress

import pytest

from vdpabridge.device import Operation
from vdpabridge.errors import DeadlineExceeded
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.layers.relay import Relay, RelayedQueue
from vdpabridge.linux.deadline import TimeLimit
from vdpabridge.rings.guest_view import GuestView

from .test_shadow_ring import Bench


@contextmanager
def relayed(*, enabled=True, with_kick=True):
    """(relay, a guest's driver and a device that is played by hand)."""
    with GuestMemory(1 << 20, 0x10_0000) as memory, SplitQueue(memory, 8) as queue:
        view = GuestView()
        view.map([memory.region])
        it = Bench(memory, queue, view, -1)
        eventfds = {Operation.SET_CALL: queue.call_fd}
        if with_kick:
            eventfds[Operation.SET_KICK] = queue.kick_fd
        relay = Relay("disk", view, {0: RelayedQueue(it.ring, eventfds, enabled=enabled)}, TimeLimit(5))
        relay.start()
        try:
            yield relay, it
        finally:
            relay.close()


def request(it):
    head = it.guest.add([(it.memory.allocate(64, 16), 64)])
    it.guest.kick()
    return head


def looked(relay):
    """The relay has made a step since."""
    for _ in range(2):
        relay._between_steps(lambda: None)


def readable(eventfd, timeout_ms=5000):
    poll = select.poll()
    poll.register(eventfd, select.POLLIN)
    return bool(poll.poll(timeout_ms))


def test_a_kick_goes_to_the_device_and_its_call_to_the_guest():
    with relayed() as (relay, it):
        head = request(it)
        assert readable(relay.wires[0].kick)
        assert it.device_sees()[0] == 1
        it.use(head, 3)
        os.eventfd_write(relay.wires[0].call, 1)
        assert readable(it.guest.call_fd)
        assert list(it.guest.used()) == [(head, 3)]


def test_nothing_new_while_it_holds_and_everything_afterwards():
    with relayed() as (relay, it):
        with relay.holding():
            request(it)
            looked(relay)
            assert it.device_sees()[0] == 0
        looked(relay)
        assert it.device_sees()[0] == 0, "until the device resumes"
        relay.go_on()
        assert readable(relay.wires[0].kick)
        assert it.device_sees()[0] == 1


def test_a_stop_that_fails_ends_the_hold():
    with relayed() as (relay, it):
        with suppress(KeyError), relay.holding():
            request(it)
            raise KeyError
        assert readable(relay.wires[0].kick)
        assert it.device_sees()[0] == 1


def test_what_was_used_without_a_call_is_shown_at_the_end():
    with relayed() as (relay, it):
        head = request(it)
        assert readable(relay.wires[0].kick)
        looked(relay)
        it.use(head)
        with relay.holding():
            pass
        relay.finish()
        assert [head for head, _ in it.guest.used()] == [head]


@pytest.mark.parametrize("options", [{"enabled": False}, {"with_kick": False}])
def test_what_is_not_at_work_gets_nothing(options):
    with relayed(**options) as (relay, it):
        request(it)
        looked(relay)
        assert it.device_sees()[0] == 0
        if not options.get("enabled", True):
            relay.enable(0, True)
        else:
            relay.bind(0, Operation.SET_KICK, it.guest.kick_fd)
        assert readable(relay.wires[0].kick)
        assert it.device_sees()[0] == 1
        os.eventfd_read(relay.wires[0].kick)
        looked(relay)
        request(it)
        assert readable(relay.wires[0].kick), "it listens to the new one"
        assert it.device_sees()[0] == 2


def test_a_call_that_is_replaced():
    with relayed() as (relay, it):
        other = os.eventfd(0, os.EFD_NONBLOCK)
        relay.bind(0, Operation.SET_CALL, other)
        relay.call_guests()
        assert os.eventfd_read(other) == 1
        os.close(other)
        assert not readable(it.guest.call_fd, 0)


def test_a_device_that_breaks_its_ring_ends_the_relay():
    with relayed() as (relay, it):
        it.used.cast("H")[1] = 5
        os.eventfd_write(relay.wires[0].call, 1)
        looks = (looked(relay) for _ in range(1000))
        while not relay.failed:
            next(looks)
        assert relay.failed == "the relay of its rings has failed: the used index went from 0 to 5, of 0 available"
        assert relay.incomplete == relay.failed


def test_a_relay_that_does_not_answer():
    with relayed() as (relay, _):
        gate = threading.Event()
        relay._limit.timeout_s = 0.05
        relay._thread.leave(gate.wait)
        with pytest.raises(DeadlineExceeded, match="does not come to an end"):
            relay.enable(0, True)
        gate.set()
        relay._limit.timeout_s = 5
        relay.enable(0, True)
