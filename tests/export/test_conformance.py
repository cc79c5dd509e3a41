"""The exporter against the protocol's own table: every request, right and wrong, over a real socket."""

import os
import socket
import struct
import threading
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.abi.vhost_user import FLAG_NEED_REPLY, FLAG_REPLY
from vdpabridge.abi.vhost_user_payloads import (
    U64,
    Config,
    DeviceStateTransfer,
    Inflight,
    Log,
    MemoryTable,
    Region,
    SingleRegion,
    VringAddr,
    VringState,
)
from vdpabridge.abi.vhost_user_table import FRONTEND_REQUESTS, PER_REGION
from vdpabridge.device import Capability, RunState, StateDirection, StatePhase
from vdpabridge.drivers.sim import Sim
from vdpabridge.export.vhost_user import Server
from vdpabridge.export.vhost_user.handlers import HANDLERS
from vdpabridge.vhost_user.connection import Connection

from ..support.front_end import ALL, MEMORY_BYTES, PROTOCOL, USER, VERSION_1, F, FrontEnd, P, one_region, ring
from ..support.pair import served
from ..support.transitions import eventfd, shared_file

LOG_ALL = 1 << 26
#: What a device of ours has no use for and does not offer. Everything else it does.
UNKNOWN = [
    *(F.SEND_RARP, F.NET_SET_MTU, F.IOTLB_MSG, F.SET_VRING_ENDIAN, F.CREATE_CRYPTO_SESSION, F.CLOSE_CRYPTO_SESSION),
    *(F.POSTCOPY_ADVISE, F.POSTCOPY_LISTEN, F.POSTCOPY_END, F.GPU_SET_SOCKET, F.VRING_KICK, F.SET_STATUS),
    *(F.GET_STATUS, F.GET_SHARED_OBJECT, F.GET_SHMEM_CONFIG),
]
KNOWN = [request for request in F if request not in UNKNOWN]


def test_every_request_that_is_known_has_its_own_handler():
    assert {request: handler.__name__ for request, handler in HANDLERS.items()} == {
        request: request.name.lower() for request in KNOWN
    }


@contextmanager
def front_end(reports=None):
    with Sim.blk(1 << 20, timeout_s=2) as sim, served(sim, reports) as ours:
        yield FrontEnd(ours, sim)


#: A payload that is right in itself for each request that has one.
PAYLOADS = {
    F.SET_FEATURES: U64(VERSION_1 | PROTOCOL),
    F.SET_MEM_TABLE: MemoryTable(one_region()),
    F.SET_LOG_BASE: Log(MEMORY_BYTES, 0),
    F.SET_VRING_NUM: VringState(0, 64),
    F.SET_VRING_ADDR: VringAddr(0, 0, USER, USER + 0x2000, USER + 0x1000, 0),
    F.SET_VRING_BASE: VringState(0, 0),
    F.GET_VRING_BASE: VringState(0, 0),
    F.SET_VRING_KICK: U64(0),
    F.SET_VRING_CALL: U64(0),
    F.SET_VRING_ERR: U64(0),
    F.SET_PROTOCOL_FEATURES: U64(ALL),
    F.SET_VRING_ENABLE: VringState(0, 0),
    F.GET_CONFIG: Config(0, 8, 0, bytes(8)),
    F.SET_CONFIG: Config(32, 1, 0, b"\1"),
    F.GET_INFLIGHT_FD: Inflight(0, 0, 2, 64),
    F.SET_INFLIGHT_FD: Inflight(MEMORY_BYTES, 0, 2, 64),
    F.ADD_MEM_REG: SingleRegion(one_region()[0]),
    F.REM_MEM_REG: SingleRegion(one_region()[0]),
    F.SET_DEVICE_STATE_FD: DeviceStateTransfer(0, 0),
    F.GET_VRING_BASE_SKIP_DRAIN: VringState(0, 0),
}


SIGNALS = {F.SET_VRING_KICK, F.SET_VRING_CALL, F.SET_VRING_ERR, F.SET_LOG_FD}


@contextmanager
def right(request):
    """(payload, descriptors) of ``request``, as it ought to be."""
    spec = FRONTEND_REQUESTS[request]
    payload = PAYLOADS[request].pack() if request in PAYLOADS else b""
    count = 1 if spec.fds[0] == PER_REGION else spec.fds[1] if request is not F.REM_MEM_REG else 0
    with ExitStack() as stack:
        if request is F.SET_BACKEND_REQ_FD:
            yield payload, [stack.enter_context(each).fileno() for each in socket.socketpair()][:1]
        else:
            made = eventfd() if request in SIGNALS else shared_file(MEMORY_BYTES)
            yield payload, [stack.enter_context(made) for _ in range(count)]


def settle(front, request):
    """Bring the back-end to where ``request`` can succeed."""
    front.negotiate()
    if request is F.REM_MEM_REG:
        with shared_file(MEMORY_BYTES) as file:
            assert front.tell(F.ADD_MEM_REG, PAYLOADS[F.ADD_MEM_REG].pack(), [file]) == 0


def test_what_is_offered():
    with front_end() as front:
        assert front.number(F.GET_PROTOCOL_FEATURES) == ALL
        assert front.number(F.GET_FEATURES) == front.sim.offered_features | PROTOCOL | LOG_ALL
        assert not front.number(F.GET_PROTOCOL_FEATURES) >> P.STATUS & 1


LESS = {
    Capability.DIRTY_LOG: {P.LOG_SHMFD},
    Capability.CONFIG_CALL: {P.BACKEND_REQ},
    Capability.INFLIGHT: {P.INFLIGHT_SHMFD, P.GET_VRING_BASE_SKIP_DRAIN},
    Capability.STATE_RESET: {P.RESET_DEVICE},
    Capability.DEVICE_STATE: {P.DEVICE_STATE},
    Capability.SKIP_DRAIN: {P.GET_VRING_BASE_SKIP_DRAIN},
    Capability.QUEUE_CONTROL: {P.GET_VRING_BASE_SKIP_DRAIN},
}


@pytest.mark.parametrize("capability", LESS)
def test_what_a_device_cannot_do_is_not_offered(capability):
    class Poorer(Sim):
        capabilities = frozenset(Capability) - {capability}

    with Poorer.blk(1 << 20) as sim, served(sim) as ours:
        front = FrontEnd(ours, sim)
        assert front.number(F.GET_PROTOCOL_FEATURES) == ALL - sum(1 << feature for feature in LESS[capability])
        assert bool(front.number(F.GET_FEATURES) & LOG_ALL) == (capability is not Capability.DIRTY_LOG)


@pytest.mark.parametrize("request_", KNOWN, ids=lambda each: each.name)
def test_every_request_that_is_right(request_):
    """Its own reply, or an acknowledgement of 0; with flags 0x5; and the next is answered as well."""
    spec = FRONTEND_REQUESTS[request_]
    with front_end() as front, right(request_) as (payload, fds):
        settle(front, request_)
        front.send(request_, payload, fds, flags=1 | (0 if spec.reply else FLAG_NEED_REPLY))
        request, flags, answer, its_fds = front.receive()
        assert (request, flags) == (request_, 5)
        for fd in its_fds:
            os.close(fd)
        assert spec.reply_fds[0] <= len(its_fds) <= spec.reply_fds[1]
        if spec.reply:
            assert spec.reply.unpack(answer)
        else:
            assert answer == bytes(8)
        assert front.is_alive()


@pytest.mark.parametrize(
    "request_", [each for each in KNOWN if not FRONTEND_REQUESTS[each].reply], ids=lambda r: r.name
)
def test_nothing_is_acknowledged_that_nobody_asked_for(request_):
    with front_end() as front, right(request_) as (payload, fds):
        settle(front, request_)
        front.send(request_, payload, fds)
        front.send(F.GET_QUEUE_NUM)
        assert front.receive()[0] == F.GET_QUEUE_NUM


@pytest.mark.parametrize("request_", [each for each in KNOWN if FRONTEND_REQUESTS[each].needs], ids=lambda r: r.name)
def test_what_was_not_negotiated_ends_the_connection(request_):
    reports = []
    with front_end(reports) as front, right(request_) as (payload, fds):
        front.negotiate(ALL & ~(1 << FRONTEND_REQUESTS[request_].needs))
        front.send(request_, payload, fds)
        assert front.receive() is None
    assert f"{request_.name}: {FRONTEND_REQUESTS[request_].needs.name} was not negotiated" in reports[-1]


@pytest.mark.parametrize("request_", UNKNOWN, ids=lambda each: each.name)
def test_what_is_not_offered_ends_the_connection(request_):
    with front_end() as front:
        front.negotiate()
        front.send(request_, bytes(8))
        assert front.receive() is None


@pytest.mark.parametrize("number", [0, 46, 1000, 0xFFFFFFFF])
def test_what_is_no_request_ends_the_connection(number):
    reports = []
    with front_end(reports) as front:
        front.send(number)
        assert front.receive() is None
    assert f"there is no request {number}" in reports[-1]


WRONG = {
    "a payload that is short": lambda payload: payload[:-1],
    "a payload that is long": lambda payload: payload + b"\0",
    "no payload": lambda payload: b"" if payload else b"\0" * 8,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("request_", KNOWN, ids=lambda each: each.name)
def test_every_payload_of_the_wrong_size(request_, name):
    with front_end() as front, right(request_) as (payload, fds):
        wrong = WRONG[name](payload) if payload else bytes(8)
        settle(front, request_)
        front.send(request_, wrong, fds)
        assert front.receive() is None


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("request_", KNOWN, ids=lambda each: each.name)
def test_every_wrong_number_of_descriptors(request_, more):
    fewest, most = FRONTEND_REQUESTS[request_].fds
    with front_end() as front, right(request_) as (payload, fds), shared_file(4096) as extra:
        settle(front, request_)
        if more > 0:
            # one that may have none (REM_MEM_REG) and gets one is still right
            fds = [*fds, extra, extra][: max(most, 1 if fewest == PER_REGION else most) + 1]
        elif not fds:
            fds = [extra, extra]
        else:
            fds = fds[:-1]
        front.send(request_, payload, fds)
        assert front.receive() is None


@pytest.mark.parametrize(
    ("flags", "why"), [(0, "version 0"), (2, "version 2"), (1 | FLAG_REPLY, "it is a reply"), (0x11, "unknown flags")]
)
def test_flags(flags, why):
    reports = []
    with front_end(reports) as front:
        front.send(F.GET_FEATURES, flags=flags)
        assert front.receive() is None
    assert why in reports[-1]


VALUES = {
    "features that were not offered": (F.SET_FEATURES, U64(VERSION_1 | 1 << 34)),
    "features without VERSION_1": (F.SET_FEATURES, U64(PROTOCOL)),
    "protocol features that were not offered": (F.SET_PROTOCOL_FEATURES, U64(ALL | 1 << P.STATUS)),
    "a queue that there is not": (F.SET_VRING_NUM, VringState(2, 64)),
    "a ring of nothing": (F.SET_VRING_NUM, VringState(0, 0)),
    "a ring that is too large": (F.SET_VRING_NUM, VringState(0, 2048)),
    "an address of a queue that there is not": (F.SET_VRING_ADDR, VringAddr(77, 0, 0, 0, 0, 0)),
    "a base of a queue that there is not": (F.SET_VRING_BASE, VringState(0xFFFFFFFF, 0)),
    "neither enabled nor disabled": (F.SET_VRING_ENABLE, VringState(0, 2)),
    "a kick without a descriptor": (F.SET_VRING_KICK, U64(0)),
    "a kick by polling": (F.SET_VRING_KICK, U64(0x100)),
    "a call without a descriptor that does not say so": (F.SET_VRING_CALL, U64(0)),
    "a call of a queue that there is not": (F.SET_VRING_CALL, U64(0x105)),
    "unknown bits beside a queue's number": (F.SET_VRING_CALL, U64(0x300)),
    "a part of the configuration space that is not writable": (F.SET_CONFIG, Config(95, 2, 0, b"xx")),
    "a write of a migration": (F.SET_CONFIG, Config(32, 1, 1, b"\1")),
    "a region that was not added": (F.REM_MEM_REG, SingleRegion(one_region()[0])),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_wrong_are_refused_and_told(name):
    """With an acknowledgement asked for it says so, and goes on; without, it hangs up."""
    request, payload = VALUES[name]
    reports = []
    with front_end(reports) as front:
        front.negotiate()
        assert front.tell(request, payload.pack()) == 1
        assert reports
        assert front.is_alive()
        front.send(request, payload.pack())
        assert front.receive() is None


MEMORY = {
    "of nothing": lambda: Region(0, 0, USER, 0),
    "beyond the end of addresses": lambda: Region((1 << 64) - 4096, 8192, USER, 0),
    "whose file offset overflows": lambda: Region(0, MEMORY_BYTES, USER, (1 << 64) - 4096),
    "that overlaps another": lambda: Region(0x1000_0000 + 4096, MEMORY_BYTES, USER * 2, 0),
    "whose user addresses overlap another's": lambda: Region(0x9000_0000, MEMORY_BYTES, USER + MEMORY_BYTES - 1, 0),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_regions_that_are_wrong(name):
    with front_end() as front, shared_file(MEMORY_BYTES) as file:
        front.negotiate()
        assert front.tell(F.ADD_MEM_REG, PAYLOADS[F.ADD_MEM_REG].pack(), [file]) == 0
        assert front.tell(F.ADD_MEM_REG, SingleRegion(MEMORY[name]()).pack(), [file]) == 1
        assert front.tell(F.SET_MEM_TABLE, MemoryTable((one_region()[0], MEMORY[name]())).pack(), [file, file]) == 1
        assert front.is_alive()
        assert [region.guest_address for region in front.sim.regions] == [0x1000_0000]


def test_a_table_replaces_what_differs_and_keeps_what_does_not():
    with front_end() as front, shared_file(MEMORY_BYTES) as first, shared_file(MEMORY_BYTES) as second:
        front.negotiate()
        one, two = one_region(2)
        assert front.tell(F.SET_MEM_TABLE, MemoryTable((one, two)).pack(), [first, second]) == 0
        os.pwrite(second, b"second", 0)
        before = front.sim._guest.slice(one.guest_address, 6)
        moved = Region(one.guest_address, one.size_bytes, USER * 5, 0)
        assert front.tell(F.SET_MEM_TABLE, MemoryTable((moved,)).pack(), [first]) == 0
        assert len(front.sim.regions) == 1
        before[:] = b"first."  # the same mapping as before: only the front-end's address is new
        assert os.pread(first, 6, 0) == b"first."
        assert front.tell(F.SET_MEM_TABLE, MemoryTable((moved,)).pack(), [second]) == 0
        assert bytes(front.sim._guest.slice(one.guest_address, 6)) == b"second"


def test_the_configuration_space():
    with front_end() as front:
        front.negotiate()
        assert front.ask(F.GET_CONFIG, Config(0, 8, 0, bytes(8)).pack()) == struct.pack("=IIIQ", 0, 8, 0, 2048)
        # the newest structure is longer than some devices' space
        answer = front.ask(F.GET_CONFIG, Config(90, 20, 0, bytes(20)).pack())
        assert (len(answer), answer[-14:]) == (32, bytes(14))


def test_a_configuration_change_is_announced():
    ours, theirs = socket.socketpair()
    with ours, theirs, front_end() as front:
        front.negotiate()
        assert front.tell(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
        assert front.tell(F.SET_CONFIG, Config(32, 1, 0, b"\0").pack()) == 0
        ours.settimeout(5)
        assert ours.recv(100) == struct.pack("=III", 2, 1, 0)


def test_a_configuration_change_while_suspended_is_announced_afterwards():
    ours, theirs = socket.socketpair()
    with ours, theirs, front_end() as front, shared_file(MEMORY_BYTES) as file:
        front.negotiate()
        front.tell(F.SET_MEM_TABLE, MemoryTable(one_region()).pack(), [file])
        front.tell(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        ring(front, 0)
        front.ask(F.GET_VRING_BASE, VringState(0, 0).pack())
        assert front.sim.state is RunState.SUSPENDED
        os.eventfd_write(front.sim.config_call, 1)
        ours.settimeout(0.1)
        with pytest.raises(TimeoutError):
            ours.recv(100)
        ring(front, 0)
        ours.settimeout(5)
        assert ours.recv(100) == struct.pack("=III", 2, 1, 0)
        ours.settimeout(0.05)
        with pytest.raises(TimeoutError):
            ours.recv(100)


def test_the_log_base_reply_has_16_bytes():
    with front_end() as front, shared_file(4096) as log:
        front.negotiate()
        assert front.ask(F.SET_LOG_BASE, Log(4096, 0).pack(), [log]) == struct.pack("=QQ", 4096, 0)


@pytest.mark.parametrize("order", [("base", "features"), ("features", "base")])
def test_the_log_is_switched_in_either_order(order):
    with front_end() as front, shared_file(1 << 16) as log:
        front.negotiate()
        steps = {
            "base": lambda: front.ask(F.SET_LOG_BASE, Log(1 << 16, 0).pack(), [log]),
            "features": lambda: front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL | LOG_ALL).pack()),
        }
        for name in order:
            assert front.sim._guest._log is None
            steps[name]()
        assert front.is_alive()
        assert front.sim._guest._log is not None
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL).pack()) == 0
        assert front.sim._guest._log is None


# --- device state ---

ACCEPTED, REFUSED = 0x100, 0x101


def transfer(front, direction=0, phase=0, fd=None):
    with shared_file(0) as file:
        return front.number(
            F.SET_DEVICE_STATE_FD, DeviceStateTransfer(direction, phase).pack(), [file if fd is None else fd]
        )


def test_a_check_without_a_transfer():
    with front_end() as front:
        front.negotiate()
        assert front.number(F.CHECK_DEVICE_STATE) == 1
        assert transfer(front) == ACCEPTED
        assert front.number(F.CHECK_DEVICE_STATE) == 0
        assert front.number(F.CHECK_DEVICE_STATE) == 1, "once is all"


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (0, 1), (0xFFFFFFFF, 0), (1, 0xFFFFFFFF)])
def test_directions_and_phases_that_do_not_exist(direction, phase):
    with front_end() as front:
        front.negotiate()
        assert transfer(front, direction, phase) == REFUSED
        assert front.is_alive()


def test_a_second_transfer_takes_the_place_of_the_first():
    with front_end() as front:
        front.negotiate()
        reader, writer = os.pipe()
        assert transfer(front, 1, fd=reader) == ACCEPTED
        os.close(reader)
        assert transfer(front, 0) == ACCEPTED
        assert front.number(F.CHECK_DEVICE_STATE) == 0
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
        os.close(writer)


@pytest.mark.parametrize("features", [None, VERSION_1 | PROTOCOL])
def test_load_before_features_and_after(features):
    """QEMU and Cloud Hypervisor load first, crosvm after SET_FEATURES."""
    with Sim.blk(1 << 20, timeout_s=2) as source, served(source) as ours, shared_file(0) as state:
        front = FrontEnd(ours, source).negotiate()
        assert transfer(front, 0, fd=state) == ACCEPTED
        assert front.number(F.CHECK_DEVICE_STATE) == 0
        os.lseek(state, 0, os.SEEK_SET)
        with front_end() as destination:
            destination.negotiate(features=features)
            assert transfer(destination, 1, fd=state) == ACCEPTED
            assert destination.number(F.CHECK_DEVICE_STATE) == 0
            assert destination.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL).pack()) == 0


def test_it_answers_while_a_transfer_runs():
    with front_end() as front:
        front.negotiate()
        reader, writer = os.pipe()
        assert transfer(front, 1, fd=reader) == ACCEPTED
        os.close(reader)
        assert front.is_alive()
        assert front.number(F.GET_QUEUE_NUM) == 2
        os.close(writer)
        assert front.number(F.CHECK_DEVICE_STATE) == 1, "an empty state is none of ours"


def test_a_check_does_not_wait_for_ever():
    with front_end() as front:
        front.sim.timeout_s = 0.1
        front.negotiate()
        reader, writer = os.pipe()
        assert transfer(front, 1, fd=reader) == ACCEPTED
        os.close(reader)
        assert front.number(F.CHECK_DEVICE_STATE) == 1
        os.close(writer)


def test_a_front_end_that_leaves_in_the_middle_leaves_the_device_as_it_was():
    with Sim.fs(timeout_s=2) as sim:
        sim.model.session.next_handle = 77
        reader, writer = os.pipe()
        with served(sim) as ours:
            front = FrontEnd(ours, sim).negotiate(ALL & ~(1 << P.CONFIG))
            assert transfer(front, 1, fd=reader) == ACCEPTED
        os.close(reader)
        os.close(writer)
        assert sim.model.session.next_handle == 77
        with served(sim) as ours:
            front = FrontEnd(ours, sim).negotiate(ALL & ~(1 << P.CONFIG))
            assert transfer(front) == ACCEPTED
            assert front.number(F.CHECK_DEVICE_STATE) == 0


CHANNELS = ["pipe", "file", "memfd"]


@pytest.mark.parametrize("kind", CHANNELS)
def test_any_kind_of_channel(kind, tmp_path):
    with front_end() as front, ExitStack() as stack:
        front.negotiate()
        if kind == "pipe":
            ours, theirs = os.pipe()
        else:
            theirs = (
                os.open(tmp_path / "state", os.O_RDWR | os.O_CREAT)
                if kind == "file"
                else os.memfd_create("state", os.MFD_CLOEXEC)
            )
            ours = os.dup(theirs)
        stack.callback(os.close, ours)
        assert transfer(front, 0, fd=theirs) == ACCEPTED
        os.close(theirs)
        if kind == "pipe":
            state = read_all(ours)
        assert front.number(F.CHECK_DEVICE_STATE) == 0
        if kind in ("file", "memfd"):
            os.lseek(ours, 0, os.SEEK_SET)
            state = read_all(ours)
        assert state[:8] == b"vdpa-sim"


@pytest.mark.parametrize("direction", [0, 1], ids=["save", "load"])
def test_a_socket_is_answered_with_a_pipe(direction):
    """A socket could bring more than bytes: another channel comes back, as the protocol allows, and is used instead."""
    with Sim.blk(1 << 20, timeout_s=2) as other, front_end() as front:
        front.negotiate()
        reader, writer = os.pipe()
        other.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
        state = read_all(reader)
        other.check_state()
        os.close(reader)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            front.send(F.SET_DEVICE_STATE_FD, DeviceStateTransfer(direction, 0).pack(), [theirs.fileno()])
        _, _, answer, (channel,) = front.receive()
        assert answer == bytes(8)
        if direction:
            os.write(channel, state)
        else:
            assert read_all(channel) == state
        os.close(channel)
        assert front.number(F.CHECK_DEVICE_STATE) == 0


#: What a front-end could keep its own connection by.
HELD_BY = {
    F.SET_BACKEND_REQ_FD: b"",
    F.SET_VRING_KICK: U64(0).pack(),
    F.SET_VRING_CALL: U64(0).pack(),
    F.SET_VRING_ERR: U64(0).pack(),
    F.SET_LOG_FD: b"",
    F.SET_LOG_BASE: Log(MEMORY_BYTES, 0).pack(),
    F.SET_INFLIGHT_FD: Inflight(MEMORY_BYTES, 0, 2, 64).pack(),
    F.SET_MEM_TABLE: MemoryTable(one_region()).pack(),
    F.ADD_MEM_REG: SingleRegion(one_region()[0]).pack(),
    F.SET_DEVICE_STATE_FD: DeviceStateTransfer(1, 0).pack(),
}


@pytest.mark.parametrize("request_", HELD_BY, ids=lambda each: each.name)
@pytest.mark.parametrize("hidden", [False, True], ids=["itself", "in the queue of another"])
def test_a_front_end_cannot_keep_its_device_when_it_has_left(request_, hidden):
    """It hands over its own end of the connection, or a socket in whose queue that lies, and goes away."""
    with Sim.blk(1 << 20, timeout_s=2) as sim, Server(sim, report=lambda _text: None, timeout_s=5) as server:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=server.serve_connection, args=[Connection(theirs, "the front-end")])
        thread.start()
        front = FrontEnd(ours, sim).negotiate()
        one, other = socket.socketpair()
        with one, other:
            if hidden:
                socket.send_fds(one, [b"x"], [ours.fileno()])
            front.send(request_, HELD_BY[request_], [other.fileno() if hidden else ours.fileno()])
        ours.close()
        thread.join(5)
        left = not thread.is_alive()
        server.stop()
        thread.join()
    assert left


def read_all(fd):
    content = b""
    while came := os.read(fd, 65536):
        content += came
    return content


# --- rings ---


@contextmanager
def with_memory(reports=None):
    with front_end(reports) as front, shared_file(MEMORY_BYTES) as file:
        front.negotiate()
        assert front.tell(F.SET_MEM_TABLE, MemoryTable(one_region()).pack(), [file]) == 0
        yield front


def test_the_device_runs_when_the_first_ring_is_enabled():
    """The others may stay disabled for ever: DPDK enables the queue pairs that are in use."""
    with with_memory() as front:
        ring(front, 0, enable=False)
        ring(front, 1, enable=False)
        assert front.is_alive()
        assert front.sim.state is RunState.CONFIGURED
        assert front.tell(F.SET_VRING_ENABLE, VringState(0, 1).pack()) == 0
        assert front.sim.state is RunState.RUNNING
        assert front.tell(F.SET_VRING_ENABLE, VringState(1, 1).pack()) == 0
        assert all(worker.enabled for worker in front.sim._engine.workers.values())


def test_rings_may_be_started_one_after_the_other():
    """As crosvm does."""
    with with_memory() as front:
        ring(front, 0)
        assert front.sim.state is RunState.RUNNING
        ring(front, 1)
        assert sorted(front.sim._engine.workers) == [0, 1]


def test_without_protocol_features_all_rings_are_enabled_at_once():
    with front_end() as front, shared_file(MEMORY_BYTES) as file:
        front.negotiate(features=VERSION_1)
        assert front.tell(F.SET_MEM_TABLE, MemoryTable(one_region()).pack(), [file]) == 0
        ring(front, 0, enable=False)
        assert front.is_alive()
        assert front.sim.state is RunState.RUNNING


def test_set_features_with_protocol_features_leaves_enable_states_alone():
    with with_memory() as front:
        ring(front, 0)
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL | LOG_ALL).pack()) == 0
        assert front.sim._engine.workers[0].enabled


def test_the_device_is_suspended_when_the_last_ring_is_stopped():
    with with_memory() as front:
        ring(front, 0)
        ring(front, 1)
        assert front.ask(F.GET_VRING_BASE, VringState(0, 0).pack()) == struct.pack("=II", 0, 0)
        assert front.sim.state is RunState.RUNNING
        assert transfer(front) == REFUSED, "a ring runs still"
        front.ask(F.GET_VRING_BASE, VringState(1, 0).pack())
        assert front.sim.state is RunState.SUSPENDED
        assert transfer(front) == ACCEPTED
        assert front.number(F.CHECK_DEVICE_STATE) == 0


def test_rings_start_again_without_being_enabled_again():
    """The enable state outlives GET_VRING_BASE."""
    with with_memory() as front:
        ring(front, 0)
        front.ask(F.GET_VRING_BASE, VringState(0, 0).pack())
        ring(front, 0, enable=False)
        assert front.is_alive()
        assert front.sim.state is RunState.RUNNING


def test_a_ring_at_work_cannot_be_moved():
    with with_memory() as front:
        ring(front, 0)
        same = VringAddr(0, 1, USER, USER + 0x2000, USER + 0x1000, 0x2000)
        assert front.tell(F.SET_VRING_ADDR, same.pack()) == 0, "only the logging changes"
        other = VringAddr(0, 0, USER + 0x4000, USER + 0x6000, USER + 0x5000, 0)
        assert front.tell(F.SET_VRING_ADDR, other.pack()) == 1
        assert front.tell(F.SET_VRING_NUM, VringState(0, 32).pack()) == 1
        assert front.tell(F.SET_VRING_BASE, VringState(0, 9).pack()) == 1
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL | 1 << 28).pack()) == 1


@pytest.mark.parametrize("address", [0x10, USER + MEMORY_BYTES, USER + MEMORY_BYTES - 8])
def test_a_ring_that_is_not_in_memory(address):
    with with_memory() as front, shared_file(0) as event:
        front.send(F.SET_VRING_NUM, VringState(0, 64).pack())
        front.send(F.SET_VRING_ADDR, VringAddr(0, 0, address & ~15, address & ~15, address & ~15, 0).pack())
        front.send(F.SET_VRING_ENABLE, VringState(0, 1).pack())
        kick = os.eventfd(0, os.EFD_CLOEXEC)
        front.send(F.SET_VRING_KICK, U64(0).pack(), [kick], flags=1 | FLAG_NEED_REPLY)
        os.close(kick)
        assert front.receive()[2] == struct.pack("=Q", 1)
        assert front.sim.state is RunState.CONFIGURED
        assert event


def test_a_device_reset_and_other_features_after_it():
    """A firmware uses the device first, then the operating system with other features."""
    with with_memory() as front:
        ring(front, 0)
        front.ask(F.GET_VRING_BASE, VringState(0, 0).pack())
        assert front.tell(F.RESET_DEVICE) == 0
        assert front.sim.state is RunState.RESET
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL | 1 << 28).pack()) == 0
        ring(front, 0)
        assert front.sim.accepted_features == VERSION_1 | 1 << 28
        assert front.sim.state is RunState.RUNNING


def test_a_device_that_died_is_an_error_and_lives_after_a_reset():
    reports = []
    with with_memory(reports) as front:
        ring(front, 0)
        front.sim._engine.failed = "a test killed it"
        assert front.tell(F.SET_VRING_ENABLE, VringState(0, 0).pack()) == 1
        assert "a test killed it" in reports[-1]
        assert front.tell(F.RESET_DEVICE) == 0
        assert front.tell(F.SET_FEATURES, U64(VERSION_1 | PROTOCOL).pack()) == 0
        ring(front, 0)
        assert front.sim.state is RunState.RUNNING


def test_a_device_that_died_has_no_base_to_tell():
    with with_memory() as front:
        ring(front, 0)
        front.sim._engine.failed = "a test killed it"
        front.send(F.GET_VRING_BASE, VringState(0, 0).pack())
        assert front.receive() is None


def test_the_next_front_end_finds_the_device_as_the_last_left_it():
    with Sim.blk(1 << 20, timeout_s=2) as sim, shared_file(MEMORY_BYTES) as file:
        for _ in range(3):
            with served(sim) as ours:
                front = FrontEnd(ours, sim).negotiate()
                assert front.tell(F.SET_MEM_TABLE, MemoryTable(one_region()).pack(), [file]) == 0
                ring(front, 0)
                assert sim.state is RunState.RUNNING
            assert sim.state is RunState.SUSPENDED
            assert sim.regions == []


MAPPED = {
    F.SET_MEM_TABLE: MemoryTable(one_region()).pack(),
    F.ADD_MEM_REG: SingleRegion(one_region()[0]).pack(),
    F.SET_LOG_BASE: Log(MEMORY_BYTES, 0).pack(),
    F.SET_INFLIGHT_FD: Inflight(MEMORY_BYTES, 0, 2, 64).pack(),
}


@pytest.mark.parametrize("request_", MAPPED, ids=lambda each: each.name)
def test_shared_memory_cannot_become_smaller_any_more(request_):
    """Else a front-end kills the process that has it mapped, by SIGBUS."""
    with front_end() as front:
        front.negotiate()
        memory = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, MEMORY_BYTES)
        if FRONTEND_REQUESTS[request_].reply:
            front.ask(request_, MAPPED[request_], [memory])
        else:
            front.tell(request_, MAPPED[request_], [memory])
        with pytest.raises(PermissionError):
            os.ftruncate(memory, 4096)
        os.close(memory)
