"""What the driver says to back-ends of all manners, to the byte, and what it makes of answers that are none."""

import os
import struct
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from vdpabridge.abi.vhost_user import FrontendRequest, ProtocolFeature
from vdpabridge.abi.vhost_user_payloads import U64
from vdpabridge.device import (
    Capability,
    DirtyLog,
    MemoryRegion,
    QueueSetup,
    RunState,
    SplitBase,
    StateDirection,
    StatePhase,
)
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import (
    DeadlineExceeded,
    DeviceFailed,
    FeatureError,
    MissingCapability,
    PeerRefused,
    ProtocolError,
    VdpaBridgeError,
)
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.vhost_user.connection import Connection

from ..support.scripted import DPDK, FULL, LOG_ALL, PASST, PROTOCOL, VERSION_1, VIRTIOFSD, scripted
from ..support.transitions import eventfd, shared_file

F, P = FrontendRequest, ProtocolFeature
SETUP = QueueSetup(256, 0x1000_0000, 0x1000_1000, 0x1000_2000)
REGION_BYTES = 1 << 20


@contextmanager
def driven(offers=FULL, features=VERSION_1 | PROTOCOL | LOG_ALL, *, answers=None, timeout_s=5, **options):
    """(back-end, our driver on it)."""
    with scripted(offers, features) as (back_end, ours):
        back_end.answers |= answers or {}
        connection = Connection(ours, "the back-end", timeout_s=timeout_s)
        with VhostUser(connection, timeout_s=timeout_s, **options) as device:
            yield back_end, device


@contextmanager
def running(*args, **options):
    """The same, running, with one queue."""
    with driven(*args, **options) as (back_end, device), shared_file(REGION_BYTES) as file, ExitStack() as stack:
        device.map([MemoryRegion(0x1000_0000, REGION_BYTES, file)])
        device.accept_features(VERSION_1)
        device.set_queue(0, SETUP)
        device.set_base(0, SplitBase(5))
        device.set_call(0, stack.enter_context(eventfd()))
        device.set_kick(0, stack.enter_context(eventfd()))
        device.enable_queue(0)
        device.start()
        yield back_end, device


# --- what is said ---


def test_negotiation_is_always_the_whole_of_it():
    with driven(VIRTIOFSD) as (back_end, device):
        assert back_end.names() == [
            "GET_FEATURES",
            "GET_PROTOCOL_FEATURES",
            "SET_PROTOCOL_FEATURES",
            "GET_FEATURES",  # the barrier: nothing is acknowledged yet
            "GET_QUEUE_NUM",
            "GET_MAX_MEM_SLOTS",
            "SET_OWNER",
        ]
        wanted = VIRTIOFSD - {P.BACKEND_SEND_FD}
        assert back_end.log[2][1] == struct.pack("=Q", sum(1 << feature for feature in wanted))
        assert device.protocol_features == sum(1 << feature for feature in wanted)
        assert device.offered_features == VERSION_1, "what is the transport's is not the guest's"


def test_starting_a_ring():
    with running(VIRTIOFSD) as (back_end, _):
        start = back_end.log[7:]
        assert start == [
            (F.ADD_MEM_REG, struct.pack("=5Q", 0, 0x1000_0000, REGION_BYTES, 0x1000_0000, 0), 1),
            (F.SET_FEATURES, struct.pack("=Q", VERSION_1 | PROTOCOL), 0),
            (F.SET_VRING_NUM, struct.pack("=II", 0, 256), 0),
            (F.SET_VRING_BASE, struct.pack("=II", 0, 5), 0),
            (F.SET_VRING_ADDR, struct.pack("=II4Q", 0, 0, 0x1000_0000, 0x1000_2000, 0x1000_1000, 0), 0),
            (F.SET_VRING_CALL, struct.pack("=Q", 0), 1),
            (F.SET_VRING_ERR, struct.pack("=Q", 0x100), 0),
            (F.SET_VRING_KICK, struct.pack("=Q", 0), 1),
            (F.SET_VRING_ENABLE, struct.pack("=II", 0, 1), 0),
        ]


def test_a_kick_is_injected_after_the_start():
    with running(VIRTIOFSD) as (_, device):
        kick = next(fd for operation, fd in device.queues[0].eventfds.items() if operation.name == "SET_KICK")
        assert os.eventfd_read(kick) == 1


def test_suspend_is_get_vring_base_and_resume_says_everything_again():
    with running(VIRTIOFSD) as (back_end, device):
        before = len(back_end.log)
        device.suspend()
        assert back_end.log[before:] == [(F.GET_VRING_BASE, struct.pack("=II", 0, 0), 0)]
        assert device.get_base(0) == SplitBase(7)
        before = len(back_end.log)
        device.resume()
        assert back_end.names(before) == [
            "SET_VRING_NUM",
            "SET_VRING_BASE",
            "SET_VRING_ADDR",
            "SET_VRING_CALL",
            "SET_VRING_ERR",
            "SET_VRING_KICK",
            "SET_VRING_ENABLE",
        ]
        assert back_end.log[before + 1][1] == struct.pack("=II", 0, 7)


def test_skipping_the_drain():
    with running(FULL) as (back_end, device):
        device.suspend(drain=False)
        assert back_end.names()[-1] == "GET_VRING_BASE_SKIP_DRAIN"
        assert back_end.log[-1][0] == 45
    with running(FULL - {P.GET_VRING_BASE_SKIP_DRAIN}) as (_, device):
        with pytest.raises(MissingCapability, match="SKIP_DRAIN"):
            device.suspend(drain=False)
        assert device.state is RunState.RUNNING


def test_memory_as_a_table():
    with driven(PASST) as (back_end, device), shared_file(REGION_BYTES) as file:
        one, two = (MemoryRegion(address, 4096, file, offset) for address, offset in ((0x1000, 0), (0x8000, 8192)))
        device.map([one])
        device.map([two])
        device.unmap([one])
        tables = [(payload, fds) for request, payload, fds in back_end.log if request is F.SET_MEM_TABLE]
        rows = [struct.pack("=4Q", 0x1000, 4096, 0x1000, 0), struct.pack("=4Q", 0x8000, 4096, 0x8000, 8192)]
        assert tables == [
            (struct.pack("=II", 1, 0) + rows[0], 1),
            (struct.pack("=II", 2, 0) + rows[0] + rows[1], 2),
            (struct.pack("=II", 1, 0) + rows[1], 1),
        ]
        device.unmap([two])
        assert back_end.names().count("SET_MEM_TABLE") == 3, "an empty table ends a connection to rust-vmm"


def test_memory_in_slots():
    with driven(VIRTIOFSD) as (back_end, device), shared_file(REGION_BYTES) as file:
        region = MemoryRegion(0x1000, 4096, file)
        device.map([region])
        device.unmap([region])
        expected = struct.pack("=5Q", 0, 0x1000, 4096, 0x1000, 0)
        assert back_end.log[-2:] == [(F.ADD_MEM_REG, expected, 1), (F.REM_MEM_REG, expected, 0)]


def test_slots_that_are_offered_and_not_there():
    """crosvm's back-end says 0."""
    answers = {F.GET_MAX_MEM_SLOTS: lambda _: [(F.GET_MAX_MEM_SLOTS, 5, bytes(8), ())]}
    with driven(VIRTIOFSD, answers=answers) as (back_end, device), shared_file(REGION_BYTES) as file:
        device.map([MemoryRegion(0x1000, 4096, file)])
        assert back_end.names()[-1] == "SET_MEM_TABLE"


def test_a_second_region_that_is_refused_takes_the_first_back():
    seen = []

    def second(message):
        seen.append(message.payload)
        return [(F.ADD_MEM_REG, 5, struct.pack("=Q", len(seen) > 1), ())]

    with driven(VIRTIOFSD, answers={F.ADD_MEM_REG: second}) as (back_end, device), shared_file(REGION_BYTES) as file:
        with pytest.raises(PeerRefused):
            device.map([MemoryRegion(0x1000, 4096, file), MemoryRegion(0x8000, 4096, file)])
        assert back_end.log[-1] == (F.REM_MEM_REG, seen[0], 0)
        assert device.regions == []


def test_the_dirty_log():
    with running(VIRTIOFSD) as (back_end, device), shared_file(4096) as log:
        before = len(back_end.log)
        device.set_dirty_log(DirtyLog(log, 4096))
        device.set_dirty_log(None)
        address = (0x1000_0000, 0x1000_2000, 0x1000_1000)
        assert back_end.log[before:] == [
            (F.SET_LOG_BASE, struct.pack("=QQ", 4096, 0), 1),
            (F.SET_FEATURES, struct.pack("=Q", VERSION_1 | PROTOCOL | LOG_ALL), 0),
            (F.SET_VRING_ADDR, struct.pack("=II4Q", 0, 1, *address, 0x1000_2000), 0),
            (F.SET_FEATURES, struct.pack("=Q", VERSION_1 | PROTOCOL), 0),
            (F.SET_VRING_ADDR, struct.pack("=II4Q", 0, 0, *address, 0), 0),
        ]


@pytest.mark.parametrize("reply", [b"", bytes(8), bytes(16)], ids=len)
def test_replies_to_set_log_base_of_all_sizes(reply):
    """DPDK, libvhost-user, rust-vmm."""
    answers = {F.SET_LOG_BASE: lambda _: [(F.SET_LOG_BASE, 5, reply, ())]}
    with running(VIRTIOFSD, answers=answers) as (_, device), shared_file(4096) as log:
        device.set_dirty_log(DirtyLog(log, 4096))


def test_the_status_byte_is_never_0_on_the_way():
    """0 is what QEMU writes whenever a guest stops, and a reset to some."""
    with running(DPDK | {P.RESET_DEVICE}) as (back_end, device):
        device.suspend()
        device.resume()
        device.suspend()
        device.reset()
        written = [struct.unpack("=Q", payload)[0] for request, payload, _ in back_end.log if request is F.SET_STATUS]
        assert written == [0xB, 0xF, 0xF]
        assert back_end.names()[-1] == "RESET_DEVICE"


def test_a_reset_by_status_where_there_is_nothing_else():
    with running(DPDK) as (back_end, device):
        device.reset()
        assert back_end.log[-1] == (F.SET_STATUS, bytes(8), 0)
        assert device.state is RunState.RESET


def test_features_that_the_status_byte_refuses():
    answers = {F.GET_STATUS: lambda _: [(F.GET_STATUS, 5, U64(3).pack(), ())]}
    with driven(DPDK, answers=answers) as (_, device), pytest.raises(FeatureError, match="FEATURES_OK"):
        device.accept_features(VERSION_1)


def test_without_acknowledgements_a_request_that_is_answered_follows():
    """So that what was asked for is done when the driver says so."""
    with running({P.MQ}) as (back_end, _):
        assert "SET_VRING_KICK" in back_end.names()
        for position, name in enumerate(back_end.names()):
            if name in ("SET_VRING_ENABLE", "SET_FEATURES", "SET_MEM_TABLE"):
                assert back_end.names()[position + 1] == "GET_FEATURES"


def test_a_back_end_without_protocol_features():
    with running(set(), VERSION_1) as (back_end, device):
        assert device.protocol_features == 0
        assert "SET_VRING_ENABLE" not in back_end.names()
        assert Capability.ENABLE_WHILE_RUNNING not in device.capabilities
        assert (F.SET_FEATURES, struct.pack("=Q", VERSION_1), 0) in back_end.log


def test_a_back_end_without_device_state_is_noticed_before_anything_stops():
    with running(VIRTIOFSD - {P.DEVICE_STATE}) as (back_end, device):
        before = len(back_end.log)
        assert Capability.DEVICE_STATE not in device.capabilities
        with shared_file(0) as file, pytest.raises(MissingCapability, match="DEVICE_STATE"):
            device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, os.dup(file))
        assert len(back_end.log) == before


@pytest.mark.parametrize(
    ("offers", "missing"),
    [
        (PASST, {Capability.CONFIG_WRITE, Capability.CONFIG_CALL, Capability.SKIP_DRAIN, Capability.INFLIGHT, Capability.STATE_RESET}),
        (DPDK, {Capability.DEVICE_STATE, Capability.SKIP_DRAIN}),
        (set(), set(Capability) - {Capability.SUSPEND, Capability.RESUME, Capability.SETUP_WHILE_SUSPENDED, Capability.QUEUE_CONTROL, Capability.ENABLE_WHILE_RUNNING}),
    ],
)  # fmt: skip
def test_capabilities(offers, missing):
    with driven(offers, device_id=2) as (_, device):
        assert device.capabilities == set(Capability) - missing


def test_identity_where_nobody_tells():
    with driven(PASST, device_id=1) as (_, device):
        assert device.identity.queue_count == 2
        assert device.identity.config_size_bytes == 0
    with driven(FULL, device_id=2) as (_, device):
        assert device.identity.config_size_bytes == 96
    with driven(FULL, queue_count=5, config_size_bytes=9999) as (_, device):
        assert (device.identity.device_id, device.identity.queue_count) == (None, 5)
        assert device.identity.config_size_bytes == 256, "QEMU's limit"


# --- device state: every reply there can be ---


def state_reply(value, fds=0):
    def answer(_message):
        made = [os.memfd_create("theirs", os.MFD_CLOEXEC) for _ in range(fds)]
        OPEN.extend(made)
        return [(F.SET_DEVICE_STATE_FD, 5, U64(value).pack(), made)]

    return answer


OPEN = []


@pytest.fixture(autouse=True)
def close_theirs():
    yield
    while OPEN:
        os.close(OPEN.pop())


@pytest.mark.parametrize(
    ("value", "fds", "outcome"),
    [
        (0x100, 0, "ours"),
        (0, 1, "theirs"),
        (0, 0, "refused"),
        (0x100, 1, "refused"),
        (0x101, 0, "refused"),
        (1, 0, "refused"),
        (1, 1, "refused"),
        ((1 << 64) - 1, 0, "refused"),
    ],
)
def test_every_reply_to_set_device_state_fd(value, fds, outcome):
    with driven(answers={F.SET_DEVICE_STATE_FD: state_reply(value, fds)}) as (_, device), shared_file(0) as file:
        if outcome == "refused":
            with pytest.raises(PeerRefused) as caught:
                device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, os.dup(file))
            assert (caught.value.request, caught.value.code) == (42, value)
            assert device.state is RunState.RESET
            device.accept_features(VERSION_1)  # the connection is as good as before
            return
        theirs = device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, os.dup(file))
        assert (theirs is None) == (outcome == "ours")
        if theirs is not None:
            os.write(theirs, b"here")
            os.close(theirs)
        device.check_state()


@pytest.mark.parametrize("code", [1, 28, (1 << 64) - 1])
def test_every_refusal_of_check_device_state(code):
    """rust-vmm's 1, passt's errno, passt's -1."""
    answers = {F.CHECK_DEVICE_STATE: lambda _: [(F.CHECK_DEVICE_STATE, 5, U64(code).pack(), ())]}
    with driven(answers=answers) as (_, device), shared_file(0) as file:
        device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, os.dup(file))
        with pytest.raises(PeerRefused) as caught:
            device.check_state()
        assert (caught.value.request, caught.value.code) == (43, code)
        assert device.state is RunState.RESET


def test_a_transfer_is_asked_for_with_direction_phase_and_one_descriptor():
    with driven() as (back_end, device), shared_file(0) as file:
        for direction in StateDirection:
            device.set_state_fd(direction, StatePhase.STOPPED, os.dup(file))
            assert back_end.log[-1] == (F.SET_DEVICE_STATE_FD, struct.pack("=II", direction, 0), 1)
            device.check_state()


def test_an_unchecked_transfer_is_ended_before_the_next():
    with driven() as (back_end, device), shared_file(0) as file:
        for _ in range(2):
            device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, os.dup(file))
        assert back_end.names()[-3:] == ["SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE", "SET_DEVICE_STATE_FD"]


# --- answers that are none ---


def reply(request, *, as_request=None, flags=5, payload=None, fds=0):
    def answer(message):
        made = [os.memfd_create("theirs", os.MFD_CLOEXEC) for _ in range(fds)]
        OPEN.extend(made)
        content = bytes(8) if payload is None else payload(message)
        return [(request if as_request is None else as_request, flags, content, made)]

    return answer


BAD_REPLIES = {
    "to another request": lambda request: reply(request, as_request=99),
    "without the reply flag": lambda request: reply(request, flags=1),
    "with a flag of a request": lambda request: reply(request, flags=0xD),
    "of another version": lambda request: reply(request, flags=6),
    "too short": lambda request: reply(request, payload=lambda _: bytes(7)),
    "too long": lambda request: reply(request, payload=lambda _: bytes(9)),
    "with descriptors": lambda request: reply(request, fds=2),
    "none: it hangs up": lambda request: lambda _message: None,
    "none: it says nothing": lambda request: lambda _message: [],
}
ASKED = {
    F.GET_VRING_BASE: lambda device: device.suspend(),
    F.SET_FEATURES: lambda device: (device.reset(), device.accept_features(VERSION_1)),
    F.SET_VRING_CALL: lambda device: device.set_call(0, None),
    F.CHECK_DEVICE_STATE: lambda device: (device.suspend(), device.check_state()),
}


#: A back-end may be long about these two: see below.
MAY_LAST = {("none: it says nothing", request) for request in (F.GET_VRING_BASE, F.CHECK_DEVICE_STATE)}
BAD = [
    pytest.param(name, request, id=f"{request.name}-{name}")
    for name in BAD_REPLIES
    for request in ASKED
    if (name, request) not in MAY_LAST
]


@pytest.mark.parametrize(("name", "request_"), BAD)
def test_answers_that_are_none(name, request_):
    """The request is named, the device has failed, and nothing more is asked of it; no descriptor is left."""
    with running(VIRTIOFSD, timeout_s=0.3) as (back_end, device):
        back_end.answers[request_] = BAD_REPLIES[name](request_)
        with pytest.raises(
            (ProtocolError, DeadlineExceeded, DeviceFailed), match=rf"{request_.name}|message {request_}\b"
        ):
            ASKED[request_](device)
        assert device.state is RunState.FAILED
        before = len(back_end.log)
        with pytest.raises(VdpaBridgeError):
            device.reset()
        with pytest.raises(DeviceFailed):
            device.check_health()
        assert len(back_end.log) == before


def test_a_drain_that_lasts_is_asked_for_again_and_not_sent_twice():
    """The reply to GET_VRING_BASE comes late; the second suspend() waits for it, and the ring's position is there."""
    with running(VIRTIOFSD, timeout_s=0.1) as (back_end, device):
        back_end.answers[F.GET_VRING_BASE] = lambda _: []
        with pytest.raises(DeadlineExceeded, match="stuck or slow"):
            device.suspend()
        assert device.state is RunState.RUNNING
        back_end.connection.send(F.GET_VRING_BASE, struct.pack("=II", 0, 99), flags=5)
        device.suspend()
        assert device.get_base(0) == SplitBase(99)
        assert back_end.names().count("GET_VRING_BASE") == 1


def test_a_transfer_that_lasts_costs_neither_the_device_nor_the_next_request():
    with running(VIRTIOFSD, timeout_s=0.1) as (back_end, device), shared_file(0) as file:
        device.suspend()
        device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, os.dup(file))
        back_end.answers[F.CHECK_DEVICE_STATE] = lambda _: []
        with pytest.raises(DeadlineExceeded):
            device.check_state()
        assert device.state is RunState.SUSPENDED
        back_end.connection.send(F.CHECK_DEVICE_STATE, bytes(8), flags=5)
        device.check_state()
        assert back_end.names().count("CHECK_DEVICE_STATE") == 1
        device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, os.dup(file))
        with pytest.raises(DeadlineExceeded):
            device.check_state()
        back_end.connection.send(F.CHECK_DEVICE_STATE, bytes(8), flags=5)
        device.set_dirty_log(None)
        assert back_end.names()[-1] == "SET_FEATURES"


def test_a_position_of_another_ring():
    answers = {F.GET_VRING_BASE: lambda _: [(F.GET_VRING_BASE, 5, struct.pack("=II", 9, 7), ())]}
    with running(VIRTIOFSD, answers=answers) as (_, device):
        with pytest.raises(ProtocolError, match="queue 9"):
            device.suspend()
        assert device.state is RunState.FAILED


def test_a_log_that_is_refused_is_not_kept():
    with running(VIRTIOFSD) as (back_end, device), shared_file(4096) as log:
        back_end.answers[F.SET_FEATURES] = lambda _: [(F.SET_FEATURES, 5, U64(1).pack(), ())]
        with pytest.raises(PeerRefused):
            device.set_dirty_log(DirtyLog(log, 4096))
        device.suspend()
        device.resume()
        addresses = [payload for request, payload, _ in back_end.log if request is F.SET_VRING_ADDR]
        assert struct.unpack("=II", addresses[-1][:8]) == (0, 0)


def test_a_configuration_space_that_is_refused():
    def refuse(message):
        return [(F.GET_CONFIG, 5, message.payload[:4] + bytes(4) + message.payload[8:12], ())]

    with driven(FULL, device_id=2, answers={F.GET_CONFIG: refuse}) as (_, device):
        with pytest.raises(PeerRefused, match="0 of 8 bytes"):
            device.read_config(0, 8)
        device.accept_features(VERSION_1)


def test_a_ring_that_is_refused_stops_the_others():
    answers = {F.SET_VRING_KICK: lambda _: [(F.SET_VRING_KICK, 5, U64(1).pack(), ())]}
    with driven(VIRTIOFSD, answers=answers) as (_, device):
        device.accept_features(VERSION_1)
        device.set_queue(0, SETUP)
        device.enable_queue(0)
        with pytest.raises(PeerRefused, match="SET_VRING_KICK") as caught:
            device.start()
        assert (caught.value.request, caught.value.code) == (12, 1)
        assert device.state is RunState.CONFIGURED


def test_more_regions_than_the_back_end_takes():
    with driven(PASST) as (_, device), shared_file(1 << 20) as file:
        with pytest.raises(ValueError, match="8 memory regions"):
            device.map([MemoryRegion(0x10000 * n, 4096, file) for n in range(9)])
        assert device.regions == []


def test_negotiation_with_somebody_who_is_no_back_end():
    with pytest.raises(ProtocolError), driven(answers={F.GET_FEATURES: reply(F.GET_FEATURES, as_request=3)}):
        pass
    with pytest.raises(DeadlineExceeded), driven(answers={F.GET_FEATURES: lambda _: []}, timeout_s=0.1):
        pass


def test_what_a_back_end_asks_for_without_leave_is_refused():
    """And a configuration change is passed on."""
    channel = []

    def keep(message):
        channel.extend(message.take_fds())
        return [(F.SET_BACKEND_REQ_FD, 5, bytes(8), ())]

    with driven(FULL, device_id=2, answers={F.SET_BACKEND_REQ_FD: keep}) as (_, device), eventfd() as changed:
        device.accept_features(VERSION_1)
        device.set_config_call(changed)
        with Connection.from_fd(channel[0], timeout_s=5) as theirs:
            for request, code in ((9, 1), (1, 1), (77, 1), (2, 0)):
                theirs.send(request, b"", flags=9)
                with theirs.receive() as answer:
                    assert (answer.request, answer.flags, answer.payload) == (request, 5, struct.pack("=Q", code))
            assert os.eventfd_read(changed) == 1


@pytest.mark.parametrize("slots", [True, False], ids=["slots", "table"])
def test_memory_that_is_mapped_twice_is_refused(slots):
    """Back-ends differ in what they make of it, and a table has no room for it."""
    offers = FULL if slots else FULL - {P.CONFIGURE_MEM_SLOTS}
    with driven(offers) as (back_end, device), GuestMemory(8192) as memory:
        region = memory.region
        device.map([region])
        since = len(back_end.log)
        upper = replace(region, guest_address=region.guest_address + 4096, size_bytes=4096, offset=4096)
        for again in ([region], [upper], [replace(region, guest_address=0), replace(region, guest_address=4096)]):
            with pytest.raises(ValueError, match="overlaps"):
                device.map(again)
        assert back_end.names(since) == []
        device.unmap([region])
        device.map([upper])
