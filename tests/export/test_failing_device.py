"""A vhost-vdpa device behind the exporter, whose kernel does not do everything that it is asked at once."""

import os
import socket
import threading
from contextlib import contextmanager

import pytest

from vdpabridge.abi.vhost_user_payloads import U64
from vdpabridge.device import RunState
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import DeviceFailed, VdpaBridgeError
from vdpabridge.export.vhost_user import Server
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.vhost_user.connection import Connection

from ..support.errands import Errands
from ..support.fake_kernel import Parent
from ..support.unlucky import Unlucky, late, refused
from ..support.waiting import wait_until

STATUS = "VHOST_VDPA_SET_STATUS"
REQUESTS_OF_A_REPLAY = [
    (STATUS, 0),
    (STATUS, 1),
    ("VHOST_SET_FEATURES", None),
    ("VHOST_SET_VRING_NUM", None),
    ("VHOST_SET_VRING_BASE", None),
    ("VHOST_SET_VRING_KICK", None),
]


@contextmanager
def serving(kernel, reports):
    with (
        VhostVdpa.open("/dev/vhost-vdpa-0", system=kernel, timeout_s=2) as device,
        Server(device, report=reports.append, timeout_s=5) as server,
    ):
        server.also_served = Errands()
        try:
            yield device, server
        finally:
            server.also_served.close()


@contextmanager
def guest(server, address=0x1000_0000):
    """A front-end whose guest's memory is at ``address``, and its device at work."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=server.serve_connection, args=[Connection(theirs, "the front-end", timeout_s=5)])
    thread.start()
    try:
        with (
            GuestMemory(1 << 20, guest_address=address) as memory,
            SplitQueue(memory, 256) as queue,
            VhostUser(Connection(ours, "us"), device_id=2, config_size_bytes=64, timeout_s=5) as front,
        ):
            front.map([memory.region])
            front.accept_features(1 << 32)
            queue.attach(front, 0)
            front.start()
            yield front
    finally:
        thread.join()


@pytest.mark.parametrize("address", [0x1000_0000, 0x2000_0000], ids=["at the same place", "elsewhere"])
@pytest.mark.parametrize("accidents", [[refused, refused], [late]], ids=["refused", "late"])
def test_a_guest_never_has_the_memory_of_the_one_before(accidents, address):
    kernel, reports = Unlucky(), []
    with serving(kernel, reports) as (device, server):
        with guest(server) as front:
            wait_until(lambda: kernel._running)
            device.timeout_s = 0.1
            kernel.accidents = [(STATUS, 0, accident) for accident in accidents]
            with pytest.raises(VdpaBridgeError):
                front.reset()
        wait_until(lambda: not device._node.stuck)
        device.timeout_s = 2
        with guest(server, address):
            wait_until(lambda: kernel._running)
            assert kernel.device_maps == {0: {address: 1 << 20}}


@pytest.mark.parametrize("at", REQUESTS_OF_A_REPLAY, ids=lambda at: f"{at[0]} {at[1]}")
def test_a_replay_that_fails_once_can_be_asked_for_again(at):
    """The device stays held; where its rings stand is known."""
    kernel, reports = Unlucky(Parent(resume="no", persist=False, forgets_maps=True)), []
    with serving(kernel, reports) as (_, server), guest(server):
        wait_until(lambda: kernel._running)
        kernel.bases[0] = 7
        assert server.also_served.run(lambda: server.hold(1)) is None
        kernel.accidents = [(*at, refused)]
        assert isinstance(server.also_served.run(lambda: server.release(1)), VdpaBridgeError)
        assert server.held
        assert not kernel._running
        assert server.also_served.run(lambda: server.release(1)) is None
        assert (kernel._running, kernel.bases[0]) == (True, 7)
        assert kernel.device_maps == {0: {0x1000_0000: 1 << 20}}


@pytest.mark.parametrize("resume", ["yes", "no"])
def test_a_hold_that_could_not_ask_where_the_rings_stand(resume):
    """That is asked again before they go on."""
    kernel, reports = Unlucky(Parent(resume=resume)), []
    with serving(kernel, reports) as (_, server), guest(server):
        wait_until(lambda: kernel._running)
        kernel.bases[0] = 20
        kernel.accidents = [("VHOST_GET_VRING_BASE", None, refused)]
        server.also_served.run(lambda: server.hold(1))
        server.also_served.run(lambda: server.release(1))
        assert (kernel._running, kernel.bases[0]) == (True, 20)


@pytest.mark.parametrize("resume", ["yes", "no"])
@pytest.mark.parametrize("then", ["stop", "release"])
def test_a_device_that_goes_on_although_that_failed(then, resume):
    """What it does meanwhile is not done again."""
    kernel, reports = Unlucky(Parent(resume=resume)), []
    with serving(kernel, reports) as (device, server), guest(server) as front:
        wait_until(lambda: kernel._running)
        kernel.bases[0] = 7
        server.also_served.run(lambda: server.hold(1))
        kernel.accidents = [("VHOST_VDPA_RESUME", None, refused)] if resume == "yes" else [(STATUS, 15, refused)]
        assert isinstance(server.also_served.run(lambda: server.release(1)), VdpaBridgeError)
        assert (device.state, kernel._running) == (RunState.RUNNING, True)
        kernel.bases[0] = 20
        if then == "stop":
            front.suspend()
            assert front.get_base(0).avail_index == 20
            assert not kernel._running
        else:
            server.also_served.run(lambda: server.release(1))
            assert (kernel._running, kernel.bases[0]) == (True, 20)


def test_a_device_that_fails_when_it_has_begun_is_lost():
    kernel, reports = Unlucky(Parent(resume="no")), []
    with serving(kernel, reports) as (_, server), guest(server):
        wait_until(lambda: kernel._running)
        kernel.bases[0] = 7
        server.also_served.run(lambda: server.hold(1))

        def fail():
            kernel.bases[0] = 20
            kernel.status |= 64

        kernel.accidents = [(STATUS, 15, fail)]
        assert isinstance(server.also_served.run(lambda: server.release(1)), DeviceFailed)
        wait_until(lambda: server.session is None)
        assert not kernel._running


def test_what_a_front_end_says_while_a_failed_device_is_held():
    """Its rings are where they were: SET_FEATURES is no reset."""
    kernel, reports = Unlucky(Parent(resume="no")), []
    with serving(kernel, reports) as (_, server), guest(server):
        wait_until(lambda: kernel._running)
        kernel.bases[0] = 7
        server.also_served.run(lambda: server.hold(1))
        kernel.accidents = [(STATUS, 0, refused)]
        assert isinstance(server.also_served.run(lambda: server.release(1)), VdpaBridgeError)
        server.also_served.run(lambda: server.session._handlers.set_features(U64(1 << 32 | 1 << 30), []))
        server.also_served.run(lambda: server.release(1))
        assert (kernel._running, kernel.bases[0]) == (True, 7)


@pytest.mark.parametrize("at", REQUESTS_OF_A_REPLAY, ids=lambda at: f"{at[0]} {at[1]}")
def test_changes_of_the_configuration_are_heard_of_also_after_a_replay_that_failed_once(at):
    kernel, reports = Unlucky(Parent(resume="no")), []
    with serving(kernel, reports) as (device, server), guest(server):
        wait_until(lambda: kernel._running)
        assert device.config_call is not None
        server.also_served.run(lambda: server.hold(1))
        kernel.accidents = [(*at, refused)]
        server.also_served.run(lambda: server.release(1))
        server.also_served.run(lambda: server.release(1))
        assert kernel._running
        assert device.config_call is not None
        assert kernel.eventfds["config"] != -1


def test_a_front_end_is_told_of_a_device_that_is_lost_while_somebody_else_held_it():
    """It would wait for its requests for ever."""
    kernel, reports = Unlucky(), []
    with serving(kernel, reports) as (device, server), guest(server) as front:
        wait_until(lambda: kernel._running)
        server.also_served.run(lambda: server.hold(1))
        kernel.status |= 64
        ring = server.session._handlers.rings._rings[0]
        ring.in_device = True
        assert isinstance(server.also_served.run(lambda: server.release(1)), DeviceFailed)

        def hung_up_on():
            try:
                front.check_health()
            except DeviceFailed:
                return True
            return False

        wait_until(hung_up_on)
        assert device.state in (RunState.FAILED, RunState.RESET)


def test_a_device_that_cannot_be_reset_costs_nothing_for_each_front_end():
    """And why it is not served is said."""
    kernel, reports = Unlucky(), []
    with serving(kernel, reports) as (device, server):
        kernel.accidents = [(STATUS, 0, refused)] * 4
        with pytest.raises(VdpaBridgeError):
            device.reset()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            ours, theirs = socket.socketpair()
            with ours:
                assert server.serve_connection(Connection(theirs, "the front-end"))
                assert ours.recv(1) == b""
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(reports) == 3
        assert all(
            "a front-end cannot be served: /dev/vhost-vdpa-0: VHOST_VDPA_SET_STATUS: EIO" in each for each in reports
        )


def test_a_device_that_cannot_be_asked_costs_its_front_end_only():
    kernel, reports = Unlucky(), []
    with serving(kernel, reports) as (device, server):
        with guest(server) as front:
            wait_until(lambda: kernel._running)
            kernel.accidents = [("VHOST_VDPA_GET_STATUS", None, refused)]
            # as a change of the configuration does, by which a device that failed says so
            os.eventfd_write(server.session.config_changed, 1)
            wait_until(lambda: server.session is None)
            del front
        assert any("GET_STATUS: EIO" in report for report in reports)
        with guest(server):
            wait_until(lambda: kernel._running)
        assert device.state is not RunState.FAILED


def test_other_features_after_a_hold_that_could_not_ask_where_the_rings_stand():
    kernel, reports = Unlucky(Parent(resume="no", features=1 << 32 | 1 << 33 | 1 << 28)), []
    with serving(kernel, reports) as (device, server), guest(server):
        wait_until(lambda: kernel._running)
        kernel.bases[0] = 20
        server.also_served.run(device.suspend)
        server.also_served.run(lambda: server.session._handlers.set_features(U64(1 << 32 | 1 << 28 | 1 << 30), []))
        assert (kernel._running, kernel.bases[0]) == (True, 20)
