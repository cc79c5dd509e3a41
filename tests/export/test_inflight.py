"""The in-flight region of a front-end that has left: the next one's ring does not have its requests done."""

import os
import time
from contextlib import contextmanager

import pytest

from vdpabridge.abi.vhost_user import FrontendRequest as F
from vdpabridge.abi.vhost_user_payloads import U64, Inflight, MemoryTable, VringAddr, VringState
from vdpabridge.device import InflightRegion, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import PeerRefused, VdpaBridgeError
from vdpabridge.export.vhost_user.handlers import Handlers
from vdpabridge.vhost_user.connection import Connection

from ..support.front_end import MEMORY_BYTES, PROTOCOL, USER, VERSION_1, one_region
from ..support.pair import bridged
from ..support.scripted import scripted
from ..support.transitions import shared_file
from ..support.waiting import wait_until
from .test_rings_walk import RingOfGuest


class Unwilling(Sim):
    """Does not take the region back, once."""

    refusals = 0

    def _set_inflight(self, region):
        if region is None and self.refusals:
            self.refusals -= 1
            raise VdpaBridgeError("set the in-flight region", device=self.name, why="not now")
        super()._set_inflight(region)


class FrontEnd:
    """A front-end's messages, without a socket."""

    def __init__(self, device, file):
        self.handlers = Handlers(device)
        self.handlers.protocol_features = (1 << 64) - 1
        self.ring = RingOfGuest(file, 0)
        self.ask(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL))
        self.ask(F.SET_MEM_TABLE, MemoryTable(one_region()), [file])

    def ask(self, request, payload, fds=()):
        fds = [os.dup(fd) for fd in fds]
        answer = self.handlers.perform(request, payload, fds)
        for fd in fds:
            os.close(fd)
        return answer

    def share_inflight(self):
        answer = self.ask(F.GET_INFLIGHT_FD, Inflight(0, 0, 1, 64))
        self.ask(F.SET_INFLIGHT_FD, answer.payload, answer.fds)
        for fd in answer.fds:
            os.close(fd)

    def start(self):
        self.ask(F.SET_VRING_NUM, VringState(0, 64))
        self.ask(F.SET_VRING_BASE, VringState(0, 0))
        self.ask(F.SET_VRING_ADDR, VringAddr(0, 0, USER, USER + 0x2000, USER + 0x1000, 0))
        self.ask(F.SET_VRING_KICK, U64(0), [self.ring.kick])
        self.ask(F.SET_VRING_ENABLE, VringState(0, 1))

    def leave(self):
        problems = self.handlers.close()
        os.close(self.ring.kick)
        return problems


@contextmanager
def device_of(sim, kind):
    if kind == "here":
        yield sim
    else:
        with bridged(sim) as device:
            yield device


@pytest.mark.parametrize("refusals", [0, 1], ids=["willing", "refused once"])
@pytest.mark.parametrize("kind", ["here", "behind vhost-user"])
def test_requests_of_a_front_end_that_has_left_are_not_the_next_ones(kind, refusals):
    with (
        shared_file(MEMORY_BYTES) as file,
        shared_file(MEMORY_BYTES) as other,
        Unwilling.blk(1 << 20, timeout_s=5) as sim,
        device_of(sim, kind) as device,
    ):
        first = FrontEnd(device, file)
        first.share_inflight()
        first.start()
        sim.faults.latency_s = 1
        first.ring.submit()
        wait_until(lambda: sim._inflight is not None and sim._engine is not None)
        time.sleep(0.1)
        first.ask(F.GET_VRING_BASE_SKIP_DRAIN, VringState(0, 0))
        assert first.ring.used == 0, "it is in flight"
        sim.refusals = refusals if kind == "here" else 0
        assert len(first.leave()) == (refusals if kind == "here" else 0)
        sim.faults.latency_s = 0
        second = FrontEnd(device, other)
        second.start()
        time.sleep(0.3)
        assert second.ring.used == 0, "it has asked for nothing"
        second.ring.submit()
        wait_until(lambda: second.ring.used)
        assert second.ring.used == 1, "its own request, and no other"
        assert second.leave() == []


# --- back-ends that do not want one ---


@contextmanager
def driven():
    with scripted() as (back_end, ours):
        connection = Connection(ours, "the back-end", timeout_s=5)
        with VhostUser(connection, device_id=2, config_size_bytes=60, timeout_s=5) as device:
            device.accept_features(VERSION_1)
            yield back_end, device


def test_a_region_that_was_refused_is_not_taken_away():
    with driven() as (back_end, device), shared_file(4096) as file:
        back_end.answers[F.SET_INFLIGHT_FD] = lambda _message: [(F.SET_INFLIGHT_FD, 5, U64(1).pack(), ())]
        with pytest.raises(PeerRefused):
            device.set_inflight(InflightRegion(file, 4096, 0, 2, 64))
        since = len(back_end.log)
        device.reset()
        assert back_end.names(since) == ["RESET_DEVICE"]


def test_a_reset_replaces_the_region_and_then_has_nothing_more_to_replace():
    with driven() as (back_end, device), shared_file(4096) as file:
        device.set_inflight(InflightRegion(file, 4096, 0, 2, 64))
        since = len(back_end.log)
        device.reset()
        assert back_end.names(since) == ["RESET_DEVICE", "GET_INFLIGHT_FD", "SET_INFLIGHT_FD"]
        since = len(back_end.log)
        device.reset()
        assert back_end.names(since) == ["RESET_DEVICE"]


def test_a_back_end_that_keeps_the_region_of_another_guest_is_of_no_use():
    """It has taken one, and gives none in its place: requests of a guest could be done in the ring of another."""
    with driven() as (back_end, device), shared_file(4096) as file:
        device.set_inflight(InflightRegion(file, 4096, 0, 2, 64))
        back_end.answers[F.GET_INFLIGHT_FD] = lambda _message: [
            (F.GET_INFLIGHT_FD, 5, Inflight(0, 0, 2, 64).pack(), ())
        ]
        with pytest.raises(PeerRefused, match="no descriptor came with it"):
            device.reset()
        assert device.state is RunState.FAILED
