"""How the exporter brings devices of lesser abilities where front-ends want them, and what is left when one leaves.

The devices are simulated ones from which capabilities were taken: what a vDPA device of some kernel can do.
"""

import os
import select
import socket
import struct
import threading
import time
from contextlib import contextmanager, nullcontext

import pytest

from vdpabridge.abi.vhost_user import FLAG_NEED_REPLY
from vdpabridge.abi.vhost_user_payloads import (
    U64,
    Config,
    DeviceStateTransfer,
    Inflight,
    MemoryTable,
    Region,
    SingleRegion,
    VringAddr,
    VringState,
)
from vdpabridge.device import Capability, Operation, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.sim.fs import FsModel
from vdpabridge.errors import DeviceFailed, MissingCapability, VdpaBridgeError
from vdpabridge.export.vhost_user import Server, Session
from vdpabridge.vhost_user.connection import Connection

from ..support.errands import Errands
from ..support.front_end import ALL, MEMORY_BYTES, PROTOCOL, USER, VERSION_1, F, FrontEnd, P, one_region, ring
from ..support.pair import bridged, served
from ..support.transitions import eventfd, shared_file
from ..support.waiting import wait_until

C = Capability
#: What kernels' vhost-vdpa offers of a device that suspends.
VDPA_6_1 = {C.SUSPEND, C.CONFIG_WRITE, C.CONFIG_CALL, C.STATE_RESET}
VDPA_6_12 = VDPA_6_1 | {C.RESUME, C.ENABLE_WHILE_RUNNING}
KERNELS = {"6.1": VDPA_6_1, "6.12": VDPA_6_12, "all": set(Capability)}


def able(capabilities):
    class Lesser(Sim):
        pass

    Lesser.capabilities = frozenset(capabilities)
    return Lesser


@contextmanager
def front_on(sim, file, reports=None):
    """A front-end that has shown its memory."""
    with served(sim, reports) as ours:
        front = FrontEnd(ours, sim)
        front.negotiate(front.number(F.GET_PROTOCOL_FEATURES))
        front.file = file
        assert front.tell(F.SET_MEM_TABLE, MemoryTable(one_region()).pack(), [file]) == 0
        yield front


@contextmanager
def serving(capabilities=frozenset(Capability), reports=None):
    with (
        able(capabilities).blk(1 << 20, timeout_s=2) as sim,
        shared_file(MEMORY_BYTES) as file,
        front_on(sim, file, reports) as front,
    ):
        yield front


def enable(front, index, enabled):
    assert front.tell(F.SET_VRING_ENABLE, VringState(index, enabled).pack()) == 0


def base_of(front, index):
    return struct.unpack("=II", front.ask(F.GET_VRING_BASE, VringState(index, 0).pack()))[1]


def working(sim):
    """The queues that are processed: enabled, and the device hears of their kicks."""
    return sorted(
        index
        for index, worker in sim._engine.workers.items()
        if worker.enabled and (index, Operation.SET_KICK) in sim._eventfds
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_stop_and_go_on_as_qemu_does(kernel):
    """ENABLE 0 of every ring, GET_VRING_BASE of every ring; then everything again, KICK before ENABLE."""
    with serving(KERNELS[kernel]) as front:
        for _ in range(3):
            for index in (0, 1):
                ring(front, index, enable=False)
            for index in (0, 1):
                enable(front, index, 1)
            assert front.sim.state is RunState.RUNNING
            assert working(front.sim) == [0, 1]
            for index in (0, 1):
                enable(front, index, 0)
            assert [base_of(front, index) for index in (0, 1)] == [0, 0]
            assert front.sim.state is RunState.SUSPENDED


@pytest.mark.parametrize("kernel", KERNELS)
def test_rings_one_after_the_other_as_crosvm_does(kernel):
    with serving(KERNELS[kernel]) as front:
        ring(front, 0)
        ring(front, 1)
        assert working(front.sim) == [0, 1]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pause_by_disabling_as_cloud_hypervisor_does(kernel):
    with serving(KERNELS[kernel]) as front:
        ring(front, 0)
        ring(front, 1)
        for enabled, at_work in ((0, []), (1, [0, 1])):
            for index in (0, 1):
                enable(front, index, enabled)
            assert working(front.sim) == at_work


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_ring_that_is_disabled_alone(kernel):
    """As QEMU does with the queue pairs that a guest does not use."""
    with serving(KERNELS[kernel]) as front:
        ring(front, 0, enable=False)
        ring(front, 1, enable=False)
        enable(front, 0, 1)
        enable(front, 1, 0)
        assert working(front.sim) == [0]
        enable(front, 1, 1)
        assert working(front.sim) == [0, 1]
        enable(front, 0, 0)
        assert working(front.sim) == [1]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_new_place_after_a_stop(kernel):
    with serving(KERNELS[kernel]) as front:
        ring(front, 0)
        base_of(front, 0)
        ring(front, 0, place=USER + 0x40000)
        assert front.sim.queues[0].setup.desc_address == one_region()[0].guest_address + 0x40000
        assert front.sim.state is RunState.RUNNING


@pytest.mark.parametrize("kernel", KERNELS)
def test_configuration_changes_are_announced_also_after_a_restart(kernel):
    ours, theirs = socket.socketpair()
    with ours, theirs, serving(KERNELS[kernel]) as front:
        ours.settimeout(5)
        assert front.tell(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
        ring(front, 0)
        base_of(front, 0)
        ring(front, 0, place=USER + 0x40000)
        assert front.tell(F.SET_CONFIG, Config(32, 1, 0, b"\0").pack()) == 0
        assert ours.recv(100) == struct.pack("=III", 2, 1, 0)


def test_every_front_end_hears_of_configuration_changes():
    with Sim.blk(1 << 20, timeout_s=2) as sim, shared_file(MEMORY_BYTES) as file:
        for value in (b"\0", b"\1"):
            ours, theirs = socket.socketpair()
            with ours, theirs, front_on(sim, file) as front:
                ours.settimeout(5)
                assert front.tell(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
                ring(front, 0)
                assert front.tell(F.SET_CONFIG, Config(32, 1, 0, value).pack()) == 0
                assert ours.recv(100) == struct.pack("=III", 2, 1, 0)


def test_a_front_end_that_does_not_take_announcements_keeps_its_device():
    ours, theirs = socket.socketpair()
    reports = []
    with theirs, serving(reports=reports) as front:
        assert front.tell(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
        theirs.close()
        ours.close()
        ring(front, 0)
        assert front.tell(F.SET_CONFIG, Config(32, 1, 0, b"\0").pack()) == 0
        wait_until(lambda: any("configuration change" in report for report in reports))
        assert front.is_alive()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_sockets_that_are_no_channel(family, kind):
    with serving() as front, socket.socket(family, kind) as useless:
        assert front.tell(F.SET_BACKEND_REQ_FD, b"", [useless.fileno()]) == 1
        assert front.is_alive()


def test_a_device_that_cannot_suspend_is_not_served():
    with able(set()).blk(1 << 20) as sim:
        with pytest.raises(MissingCapability, match="SUSPEND"):
            Server(sim, report=print)
        ours, theirs = socket.socketpair()
        with ours, pytest.raises(MissingCapability):
            Session(sim, Connection(theirs, "front-end"), report=print)


def test_a_bad_ring_leaves_the_good_ones_at_work():
    with serving(VDPA_6_1) as front:
        ring(front, 0)
        with eventfd() as event:
            front.send(F.SET_VRING_NUM, VringState(1, 64).pack())
            front.send(F.SET_VRING_ADDR, VringAddr(1, 0, 0x10, 0x10, 0x10, 0).pack())
            front.send(F.SET_VRING_ENABLE, VringState(1, 1).pack())
            front.send(F.SET_VRING_KICK, U64(1).pack(), [event], flags=1 | FLAG_NEED_REPLY)
        assert front.receive()[2] == struct.pack("=Q", 1)
        assert working(front.sim) == [0]


# --- a device with state is never reset for want of another way ---


def guest_of(capabilities, queue_count):
    """A device with state, and the number of its resets: `mounted` makes it one that a guest has used."""

    class Counting(Sim):
        resets = 0

        def _reset(self):
            type(self).resets += 1
            super()._reset()

    Counting.capabilities = frozenset(capabilities)
    return Counting(FsModel(request_queues=queue_count - 1), "sim:fs", timeout_s=5)


def stop_as_qemu(front, count):
    for index in range(count):
        enable(front, index, 0)
    for index in range(count):
        base_of(front, index)


def stop_as_crosvm(front, count):
    for index in range(count):
        enable(front, index, 0)
        base_of(front, index)


WITH_STATE = {C.SUSPEND, C.DEVICE_STATE, C.STATE_RESET, C.CONFIG_CALL}


@pytest.mark.parametrize("stop", [stop_as_qemu, stop_as_crosvm])
@pytest.mark.parametrize("queue_count", [2, 4])
@pytest.mark.parametrize("more", [set(), {C.RESUME}, {C.RESUME, C.ENABLE_WHILE_RUNNING}])
def test_an_ordinary_stop_resets_nothing(more, queue_count, stop):
    with (
        guest_of(WITH_STATE | more, queue_count) as sim,
        shared_file(MEMORY_BYTES) as file,
        front_on(sim, file) as front,
    ):
        for index in range(queue_count):
            ring(front, index, enable=False)
        for index in range(queue_count):
            enable(front, index, 1)
        assert working(sim) == list(range(queue_count))
        sim.model.session.next_handle = 77
        stop(front, queue_count)
        assert (sim.state, type(sim).resets, sim.model.session.next_handle) == (RunState.SUSPENDED, 0, 77)
        # and what goes on has it still, also where that takes a reset
        for index in range(queue_count):
            ring(front, index, enable=False)
        for index in range(queue_count):
            enable(front, index, 1)
        assert (sim.state, sim.model.session.next_handle) == (RunState.RUNNING, 77)
        assert working(sim) == list(range(queue_count))


@pytest.mark.parametrize("more", [set(), {C.RESUME}, {C.RESUME, C.SETUP_WHILE_SUSPENDED}])
def test_a_ring_goes_on_where_the_front_end_says(more):
    """Where it was stopped, which is what a device that can resume does by itself; or anywhere else."""
    with guest_of({C.SUSPEND, C.CONFIG_CALL} | more, 2) as sim, shared_file(MEMORY_BYTES) as file:
        resets = type(sim)
        with front_on(sim, file) as front:
            for index in (0, 1):
                ring(front, index, enable=False, base=7)
            for index in (0, 1):
                enable(front, index, 1)
            before = resets.resets
            assert [sim._engine.workers[index].ring.avail_index for index in (0, 1)] == [7, 7]
            for index in (0, 1):
                enable(front, index, 0)
            assert [base_of(front, index) for index in (0, 1)] == [7, 7]
            for base, count in ((7, 0 if more else 1), (9, 0 if C.SETUP_WHILE_SUSPENDED in more else 1)):
                for index in (0, 1):
                    ring(front, index, enable=False, base=base)
                for index in (0, 1):
                    enable(front, index, 1)
                assert [sim._engine.workers[index].ring.avail_index for index in (0, 1)] == [base, base]
                assert resets.resets - before == count
                before = resets.resets
                stop_as_qemu(front, 2)


BUSY = {
    "with state": WITH_STATE,
    "with state and RESUME": WITH_STATE | {C.RESUME},
    "RESUME": {C.SUSPEND, C.CONFIG_CALL, C.RESUME},
    "all that set up while suspended": set(Capability) - {C.ENABLE_WHILE_RUNNING, C.QUEUE_CONTROL},
    "6.1": VDPA_6_1,
    "everything": set(Capability),
}


@pytest.mark.parametrize("name", BUSY)
def test_a_disabled_ring_is_not_looked_into(name):
    """Whatever lies in it: when the others start, after a pause, when memory comes again."""
    with serving(BUSY[name]) as front:
        for index in (0, 1):
            ring(front, index, enable=False)
        enable(front, 1, 0)
        submit_one(front, 1, kick=False)
        enable(front, 0, 1)
        check_idle(front)
        enable(front, 0, 0)
        enable(front, 0, 1)
        check_idle(front)
        region = SingleRegion(one_region()[0]).pack()
        assert front.tell(F.REM_MEM_REG, region) == 0
        assert front.tell(F.ADD_MEM_REG, region, [front.file]) == 0
        check_idle(front)
        enable(front, 1, 1)
        wait_until(lambda: used(front, 1) == 1)


def used(front, index):
    return struct.unpack("<H", os.pread(front.file, 2, 0x10000 * index + 0x2002))[0]


def check_idle(front):
    assert front.sim.state is RunState.RUNNING
    time.sleep(0.02)
    assert used(front, 1) == 0


@pytest.mark.parametrize("more", [set(), {C.RESUME}, {C.RESUME, C.SETUP_WHILE_SUSPENDED}])
def test_a_pause_ends_although_a_ring_came_meanwhile_that_was_never_enabled(more):
    with serving(VDPA_6_1 | more) as front:
        for index in (0, 1):
            ring(front, index, kick=False, enable=False)
        enable(front, 1, 1)
        with eventfd() as kick:
            for index in (1, 0):
                assert front.tell(F.SET_VRING_KICK, U64(index).pack(), [kick]) == 0
            assert working(front.sim) == [1]
            enable(front, 1, 0)
            enable(front, 1, 1)
            assert (front.sim.state, working(front.sim)) == (RunState.RUNNING, [1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_ring_does_not_wait_for_ever_for_one_of_which_nothing_is_said(kernel):
    """As QEMU leaves those queue pairs of a network card that the guest does not use; and a restart of one that was."""
    with serving(KERNELS[kernel]) as front:
        ring(front, 0, enable=False)
        ring(front, 1, enable=False)
        enable(front, 0, 1)
        wait_until(lambda: (front.sim.state, working(front.sim)) == (RunState.RUNNING, [0]))
        enable(front, 1, 0)
        base_of(front, 1)
        ring(front, 1, enable=False)
        wait_until(lambda: (front.sim.state, working(front.sim)) == (RunState.RUNNING, [0]))


def test_a_ring_that_was_waited_for_and_is_stopped():
    with serving(VDPA_6_1) as front:
        ring(front, 1, enable=False)
        ring(front, 0)
        base_of(front, 1)
        assert (front.sim.state, working(front.sim)) == (RunState.RUNNING, [0])


@contextmanager
def holdable(device=None):
    """A front-end of ``device`` that somebody else can hold: (front-end, server)."""
    with (
        able(VDPA_6_1).blk(1 << 20, timeout_s=2) if device is None else nullcontext(device) as sim,
        shared_file(MEMORY_BYTES) as file,
        Server(sim, report=print, timeout_s=5) as server,
    ):
        server.also_served = Errands()
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=server.serve_connection, args=[Connection(theirs, "the front-end")])
        thread.start()
        try:
            front = FrontEnd(ours, sim)
            front.negotiate(front.number(F.GET_PROTOCOL_FEATURES))
            front.file = file
            assert front.tell(F.SET_MEM_TABLE, MemoryTable(one_region()).pack(), [file]) == 0
            yield front, server
        finally:
            server.stop()
            thread.join()
            ours.close()
            server.also_served.close()


class RefusesOnce(Sim):
    """A disk that does not enable queue 1 when told to, and by then has done what there was in queue 0."""

    wait = None

    def _enable_queue(self, index, enabled):
        if index == 1 and enabled and self.wait is not None:
            wait, self.wait = self.wait, None
            wait()
            raise VdpaBridgeError("enable", why="a test forbids it")
        super()._enable_queue(index, enabled)


@pytest.mark.parametrize("then", ["asked where it stands", "tried again"])
def test_a_back_end_that_has_worked_before_it_refuses(then):
    """What it did is not done again: its driver has stopped it, and knows where."""
    with (
        RefusesOnce.blk(1 << 20, timeout_s=2) as sim,
        bridged(sim) as device,
        holdable(device) as (front, server),
    ):
        for index in (0, 1):
            ring(front, index)
        server.also_served.run(lambda: server.hold(1))
        submit_one(front)
        sim.wait = lambda: wait_until(lambda: used(front, 0) == 1)
        assert isinstance(server.also_served.run(lambda: server.release(1)), VdpaBridgeError)
        if then == "asked where it stands":
            assert base_of(front, 0) == 1
        else:
            assert server.also_served.run(lambda: server.release(1)) is None
            time.sleep(0.02)
            assert (device.state, used(front, 0)) == (RunState.RUNNING, 1)


def test_a_ring_that_has_worked_before_it_is_refused():
    """It joins others that are at work."""
    with RefusesOnce.blk(1 << 20, timeout_s=2) as sim, bridged(sim) as device, holdable(device) as (front, _):
        ring(front, 0)
        ring(front, 1, enable=False)
        sim.wait = lambda: None
        assert front.tell(F.SET_VRING_ENABLE, VringState(1, 1).pack()) == 1
        assert base_of(front, 1) == 0
        assert device.state is RunState.RUNNING


def test_a_lost_device_does_not_take_features():
    """It would forget where its rings stand, and say that all is well."""
    with serving() as front:
        ring(front, 0)
        front.sim._engine.failed = "a test killed it"
        assert front.tell(F.SET_VRING_ENABLE, VringState(0, 0).pack()) == 1
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL).pack()) == 1
        assert front.tell(F.RESET_DEVICE) == 0
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL).pack()) == 0


def test_rings_that_came_while_the_device_was_held_start_after_that():
    with holdable() as (front, server):
        server.also_served.run(lambda: server.hold(1))
        ring(front, 0, enable=False)
        ring(front, 1, enable=False)
        enable(front, 0, 1)
        server.also_served.run(lambda: server.release(1))
        wait_until(lambda: front.sim.state is RunState.RUNNING)


def test_a_ring_that_is_stopped_before_a_start_is_tried_again_stays_stopped():
    with holdable() as (front, server):
        for index in (0, 1):
            ring(front, index, enable=False)
        for index in (0, 1):
            enable(front, index, 1)
        assert working(front.sim) == [0, 1]
        server.also_served.run(lambda: server.hold(1))

        def fail():
            raise VdpaBridgeError("start", why="a test forbids it")

        front.sim._start = fail
        assert isinstance(server.also_served.run(lambda: server.release(1)), VdpaBridgeError)
        del front.sim._start
        assert base_of(front, 1) == 0
        server.also_served.run(lambda: server.release(1))
        assert (front.sim.state, working(front.sim)) == (RunState.RUNNING, [0])
        assert not front.sim.queues[1].enabled


def test_what_a_front_end_says_of_other_things_does_not_make_its_rings_wait():
    with serving(VDPA_6_1) as front:
        ring(front, 0, enable=False)
        ring(front, 1, enable=False)
        enable(front, 0, 1)

        def starts_while_asked():
            assert front.is_alive()
            return front.sim.state is RunState.RUNNING

        wait_until(starts_while_asked)


def test_a_log_is_kept_also_after_a_ring_that_could_not_be_set_up():
    """It took a reset for the one that failed, and the others resume without one."""
    log_bytes = 1 << 14
    with serving(set(VDPA_6_1) | {C.DIRTY_LOG, C.INFLIGHT}) as front, shared_file(log_bytes) as log:
        front.send(F.GET_INFLIGHT_FD, Inflight(0, 0, 2, 64).pack())
        _, _, payload, fds = front.receive()
        assert front.tell(F.SET_INFLIGHT_FD, payload, fds) == 0
        os.close(fds[0])
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL | 1 << 26).pack()) == 0
        assert front.ask(F.SET_LOG_BASE, struct.pack("=QQ", log_bytes, 0), [log])
        ring(front, 0)
        front.send(F.SET_VRING_NUM, VringState(1, 48).pack())
        front.send(F.SET_VRING_ADDR, VringAddr(1, 0, USER + 0x10000, USER + 0x12000, USER + 0x11000, 0).pack())
        with eventfd() as kick:
            assert front.tell(F.SET_VRING_KICK, U64(1).pack(), [kick]) == 0
        assert front.tell(F.SET_VRING_ENABLE, VringState(1, 1).pack()) == 1
        base_of(front, 1)
        enable(front, 0, 1)
        assert (front.sim.state, working(front.sim)) == (RunState.RUNNING, [0])
        assert front.sim._engine.workers[0].ring.tracked
        submit_one(front)
        wait_until(lambda: used(front, 0) == 1)
        assert any(os.pread(log, log_bytes, 0))


def test_a_front_end_that_is_not_silent_is_waited_for():
    """One reset saved for each ring."""
    with (
        guest_of({C.SUSPEND, C.CONFIG_CALL}, 2) as sim,
        shared_file(MEMORY_BYTES) as file,
        front_on(sim, file) as front,
    ):
        ring(front, 0, enable=False)
        ring(front, 1, enable=False)
        enable(front, 0, 1)
        assert sim.state is RunState.CONFIGURED
        enable(front, 1, 1)
        assert (sim.state, working(sim), type(sim).resets) == (RunState.RUNNING, [0, 1], 0)


def test_a_front_end_whose_rings_cannot_be_started_after_a_silence_is_hung_up_on():
    """There is no reply to say it in, and it would wait for ever."""
    reports = []
    with serving(VDPA_6_1, reports) as front:
        ring(front, 0, enable=False)
        ring(front, 1, enable=False)
        enable(front, 0, 1)
        front.sim._start = lambda: (_ for _ in ()).throw(OSError(5, "a test forbids it"))
        assert front.receive() is None
        wait_until(lambda: reports == ["the front-end: start the rings: [Errno 5] a test forbids it"])
        del front.sim._start


@pytest.mark.parametrize("kernel", KERNELS)
def test_features_without_the_protocols_bit_enable_what_was_disabled(kernel):
    with serving(KERNELS[kernel]) as front:
        for index in (0, 1):
            ring(front, index, enable=False)
            enable(front, index, index)
        assert working(front.sim) == [1]
        assert front.tell(F.SET_FEATURES, U64(VERSION_1).pack()) == 0
        assert working(front.sim) == [0, 1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("by", ["table", "region"])
def test_a_ring_that_follows_its_memory_to_other_addresses(by, kernel):
    """The memory moves first, and where the ring is in it is said then."""
    with serving(KERNELS[kernel]) as front:
        ring(front, 0)
        one = one_region()[0]
        moved = Region(one.guest_address, one.size_bytes, USER * 2, 0)
        if by == "table":
            assert front.tell(F.SET_MEM_TABLE, MemoryTable((moved,)).pack(), [front.file]) == 0
        else:
            assert front.tell(F.REM_MEM_REG, SingleRegion(one).pack()) == 0
            assert front.tell(F.ADD_MEM_REG, SingleRegion(moved).pack(), [front.file]) == 0
        place = USER * 2
        assert front.tell(F.SET_VRING_ADDR, VringAddr(0, 0, place, place + 0x2000, place + 0x1000, 0).pack()) == 0
        assert front.sim.state is RunState.RUNNING
        submit_one(front)
        wait_until(lambda: used(front, 0) == 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_front_end_has_said_of_its_rings_outlives_other_features(kernel):
    """The order of the two is its own."""
    with serving(KERNELS[kernel]) as front:
        ring(front, 0)
        base_of(front, 0)
        ring(front, 0, base=7, kick=False)
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL | 1 << 9).pack()) == 0
        with eventfd() as kick:
            assert front.tell(F.SET_VRING_KICK, U64(0).pack(), [kick]) == 0
        assert front.sim.state is RunState.RUNNING
        assert front.sim._engine.workers[0].ring.avail_index == 7


def test_requests_in_flight_and_the_dirty_log_outlive_the_resets_that_we_need():
    """Other features; a ring that joins one that runs."""
    shape = set(Capability) - {C.ENABLE_WHILE_RUNNING, C.QUEUE_CONTROL, C.DEVICE_STATE, C.SETUP_WHILE_SUSPENDED}
    log_bytes = 1 << 14
    with serving(shape) as front, shared_file(log_bytes) as log:
        front.send(F.GET_INFLIGHT_FD, Inflight(0, 0, 2, 64).pack())
        _, _, payload, fds = front.receive()
        assert front.tell(F.SET_INFLIGHT_FD, payload, fds) == 0
        os.close(fds[0])
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL | 1 << 9 | 1 << 26).pack()) == 0
        assert front.ask(F.SET_LOG_BASE, struct.pack("=QQ", log_bytes, 0), [log])
        ring(front, 0)
        assert front.sim._engine.workers[0].ring.tracked
        submit_one(front)
        wait_until(lambda: used(front, 0) == 1)
        assert any(os.pread(log, log_bytes, 0))
        os.pwrite(log, bytes(log_bytes), 0)
        ring(front, 1)
        wait_until(lambda: working(front.sim) == [0, 1])
        submit_one(front, 1, kick=False)
        front.kick(1)
        wait_until(lambda: used(front, 1) == 1)
        assert any(os.pread(log, log_bytes, 0))
        assert front.sim._engine.workers[1].ring.tracked


@pytest.mark.parametrize("kind", [(1, 1), (1, 7), (2, 0)])
def test_a_load_that_is_not_even_begun_leaves_what_is_there(kind):
    with Sim.fs(tag="tag", timeout_s=2) as sim:
        sim.accept_features(VERSION_1)
        sim.model.session.next_handle = 77
        with served(sim) as ours, shared_file(0) as state:
            front = FrontEnd(ours, sim).negotiate(features=None)
            assert front.number(F.SET_DEVICE_STATE_FD, DeviceStateTransfer(*kind).pack(), [state]) & 0xFF
            assert sim.model.session.next_handle == 77


def test_a_ring_that_is_at_work_does_not_wait_for_one_that_was_never_enabled():
    """Where waiting saves no reset."""
    with serving(WITH_STATE) as front:
        ring(front, 1, enable=False)
        ring(front, 0, enable=False)
        enable(front, 1, 1)
        assert (front.sim.state, working(front.sim)) == (RunState.RUNNING, [1])


def test_a_region_without_rings_goes_without_a_pause():
    with guest_of(WITH_STATE, 2) as sim, shared_file(MEMORY_BYTES) as file, front_on(sim, file) as front:
        for index in (0, 1):
            ring(front, index, enable=False)
        for index in (0, 1):
            enable(front, index, 1)
        more = Region(0x9000_0000, MEMORY_BYTES, USER * 9, 0)
        worker = sim._engine.workers[0]
        assert front.tell(F.ADD_MEM_REG, SingleRegion(more).pack(), [file]) == 0
        assert front.tell(F.REM_MEM_REG, SingleRegion(more).pack()) == 0
        assert (sim.state, type(sim).resets) == (RunState.RUNNING, 0)
        assert sim._engine.workers[0] is worker


def test_a_kick_that_comes_while_its_ring_is_disabled_is_not_lost():
    with serving(VDPA_6_1) as front:
        for index in (0, 1):
            ring(front, index, enable=False)
            enable(front, index, 1)
        enable(front, 0, 0)
        submit_one(front)
        assert working(front.sim) == [1]
        enable(front, 0, 1)
        wait_until(lambda: os.pread(front.file, 2, 0x2002) == b"\1\0")


# --- memory under a running device ---


def test_memory_that_moves_under_a_running_ring():
    """The same memory as other descriptors and at other user addresses: the device does not even pause."""
    with serving() as front, shared_file(MEMORY_BYTES) as other:
        ring(front, 0)
        worker = front.sim._engine.workers[0]
        one = one_region()[0]
        moved = Region(one.guest_address, one.size_bytes, USER * 2, 0)
        files = os.open(f"/proc/self/fd/{front.file}", os.O_RDWR)
        assert front.tell(F.SET_MEM_TABLE, MemoryTable((moved,)).pack(), [files]) == 0
        os.close(files)
        assert front.sim._engine.workers[0] is worker
        place = USER * 2
        same = VringAddr(0, 1, place, place + 0x2000, place + 0x1000, 0)
        assert front.tell(F.SET_VRING_ADDR, same.pack()) == 0
        assert front.tell(F.SET_MEM_TABLE, MemoryTable((moved,)).pack(), [other]) == 0
        assert front.sim._engine.workers[0] is not worker, "other memory: it was stopped, and goes on there"
        assert front.sim.state is RunState.RUNNING
        assert not front.sim._engine.workers[0].broken


def test_a_region_that_goes_and_comes_back_takes_its_rings_along():
    with serving() as front, shared_file(MEMORY_BYTES) as file:
        ring(front, 0)
        assert front.tell(F.REM_MEM_REG, SingleRegion(one_region()[0]).pack()) == 0
        assert front.sim.state is RunState.SUSPENDED
        assert front.tell(F.ADD_MEM_REG, SingleRegion(one_region()[0]).pack(), [file]) == 0
        assert front.sim.state is RunState.RUNNING
        assert working(front.sim) == [0]


# --- what is left when a front-end leaves ---


@contextmanager
def left_by(act, **options):
    """A device that a front-end has used and left, by way of ``act``; the reports; another front-end's memory."""
    reports = []
    with Sim.blk(1 << 20, timeout_s=0.2, **options) as sim, shared_file(MEMORY_BYTES) as file:
        with front_on(sim, file, reports) as front:
            ring(front, 0)
            act(front)
        yield sim, reports, file


def test_a_device_that_died_is_whole_for_the_next():
    def die(front):
        front.sim._engine.failed = "a test killed it"

    with left_by(die) as (sim, reports, file):
        assert "a test killed it" in reports[-1]
        assert sim.regions == []
        with front_on(sim, file) as front:
            ring(front, 0)
            assert sim.state is RunState.RUNNING


def test_a_device_that_does_not_suspend_is_reset():
    """Nothing may go on in the memory of a guest that is gone."""

    def get_stuck(front):
        front.sim.faults.latency_s = 3600
        submit_one(front)
        wait_until(lambda: front.sim._engine.workers[0].ring.taken)

    with left_by(get_stuck) as (sim, reports, file):
        assert "still in flight" in reports[-1]
        assert (sim.state, sim.regions) == (RunState.RESET, [])
        sim.faults.latency_s = 0
        with front_on(sim, file) as front:
            ring(front, 0)
            assert sim.state is RunState.RUNNING


def submit_one(front, index=0, *, kick=True):
    """Make a request available in a ring, by hand."""
    memory, place, guest = front.file, 0x10000 * index, one_region()[0].guest_address + 0x10000 * index
    os.pwrite(memory, struct.pack("<QIHH", guest + 0x8000, 16, 1, 1), place)
    os.pwrite(memory, struct.pack("<QIHH", guest + 0x9000, 1, 2, 0), place + 16)
    os.pwrite(memory, struct.pack("<HHH", 0, 1, 0), place + 0x1000)
    if kick:
        front.kick()


def test_state_is_loaded_into_a_device_that_has_no_other():
    """The last front-end's features are gone; those that come after the load do not take the state with them."""
    with Sim.blk(1 << 20, timeout_s=2) as source, shared_file(0) as state, shared_file(MEMORY_BYTES) as file:
        source.model.write_config(32, b"\0")
        with served(source) as ours:
            transfer(FrontEnd(ours, source).negotiate(), 0, state)
        with left_by(lambda front: None) as (sim, _, _), served(sim) as ours:
            front = FrontEnd(ours, sim).negotiate(features=None)
            transfer(front, 1, state)
            assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL | 1 << 28).pack()) == 0
            assert sim.read_config(32, 1) == b"\0"
            assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL).pack()) == 0
            assert sim.accepted_features == VERSION_1
            assert sim.read_config(32, 1) == b"\0"
            assert file


def transfer(front, direction, state):
    os.lseek(state, 0, os.SEEK_SET)
    assert front.number(F.SET_DEVICE_STATE_FD, DeviceStateTransfer(direction, 0).pack(), [state]) == 0x100
    assert front.number(F.CHECK_DEVICE_STATE) == 0


def test_the_in_flight_region_of_one_guest_is_not_the_next_ones():
    def keep_one(front):
        base_of(front, 0)
        front.send(F.GET_INFLIGHT_FD, Inflight(0, 0, 1, 64).pack())
        _, _, payload, fds = front.receive()
        assert front.tell(F.SET_INFLIGHT_FD, payload, fds) == 0
        os.close(fds[0])
        ring(front, 0)
        assert front.sim._engine.workers[0].ring.tracked

    with left_by(keep_one) as (sim, _, _):
        assert sim._inflight is None


def test_a_back_end_behind_us_that_dies_ends_the_service():
    """The front-end is hung up on, and whoever serves hears of it: no reset brings a process back."""
    with Sim.blk(1 << 20, timeout_s=2) as sim, bridged(sim, timeout_s=1) as device:
        ours, theirs = socket.socketpair()
        with ours, Server(device, report=lambda _text: None) as server:
            device._requests.connection._socket.shutdown(socket.SHUT_RDWR)
            with pytest.raises(DeviceFailed, match="a reset did not help"):
                server.serve_connection(Connection(theirs, "front-end", timeout_s=1))
            ours.settimeout(5)
            assert ours.recv(1) == b""


@pytest.mark.parametrize("size", [257, 1 << 26, 0xFFFFFFFF])
def test_a_configuration_space_of_any_size_is_not_made_up(size):
    with serving() as front:
        front.send(F.GET_CONFIG, struct.pack("=III", 0, size, 0))
        assert front.receive() is None


def test_bits_that_the_protocol_cannot_carry_are_not_offered():
    class Wide(Sim):
        offered_features = (1 << 50) - 1

    with Wide.blk(1 << 20) as sim, served(sim) as ours:
        offered = FrontEnd(ours, sim).number(F.GET_FEATURES)
        assert [bit for bit in range(50) if not offered >> bit & 1] == [37, 38, 41, 43]
    Wide.capabilities = frozenset(Capability) - {C.QUEUE_CONTROL}
    with Wide.blk(1 << 20) as sim, served(sim) as ours:
        assert not FrontEnd(ours, sim).number(F.GET_FEATURES) >> 40 & 1


def test_rings_that_skip_the_drain():
    with serving() as front:
        front.send(F.GET_INFLIGHT_FD, Inflight(0, 0, 2, 64).pack())
        _, _, payload, fds = front.receive()
        assert front.tell(F.SET_INFLIGHT_FD, payload, fds) == 0
        os.close(fds[0])
        ring(front, 0)
        front.sim.faults.latency_s = 3600
        submit_one(front)
        wait_until(lambda: front.sim._engine.workers[0].ring.taken)
        reply = front.ask(F.GET_VRING_BASE_SKIP_DRAIN, VringState(0, 0).pack())
        assert reply == struct.pack("=II", 0, 1)
        assert front.sim.state is RunState.SUSPENDED
        assert ALL >> P.GET_VRING_BASE_SKIP_DRAIN & 1


def test_a_signal_wakes_the_server_and_ends_nothing_by_itself(tmp_path):
    """What it brings about is its handler's business; the server only must not sleep over it."""
    woken, wake = os.pipe2(os.O_NONBLOCK)
    with Sim.blk(1 << 20, timeout_s=5) as device, Server(device, report=print, timeout_s=5) as server:
        ours, theirs = socket.socketpair()
        server.signal_fd = woken
        thread = threading.Thread(target=server.serve_connection, args=[Connection(theirs, "the front-end")])
        thread.start()
        os.write(wake, b"\x0f")
        wait_until(lambda: not select.select([woken], [], [], 0)[0])
        front = FrontEnd(ours, device)
        assert front.number(F.GET_FEATURES)
        server.stop()
        thread.join()
        ours.close()
    os.close(woken)
    os.close(wake)
