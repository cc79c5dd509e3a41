"""The vhost-user wire format against bytes written out by hand, little-endian as every machine this runs on."""

import sys

import pytest
from hypothesis import given
from hypothesis.strategies import binary, integers

from vdpabridge.abi import vhost_user_payloads as payloads
from vdpabridge.abi.vhost_user import (
    FLAG_NEED_REPLY,
    HEADER,
    PAYLOAD_SIZE_MAX,
    REPLY_FLAGS,
    BackendRequest,
    FrontendRequest,
    ProtocolFeature,
)
from vdpabridge.abi.vhost_user_payloads import (
    U64,
    Config,
    DeviceStateTransfer,
    Empty,
    Inflight,
    Iotlb,
    Log,
    MemoryTable,
    Mmap,
    Opaque,
    PayloadError,
    Region,
    SharedObject,
    ShmemConfig,
    SingleRegion,
    VringAddr,
    VringArea,
    VringState,
)
from vdpabridge.abi.vhost_user_table import BACKEND_REQUESTS, FRONTEND_REQUESTS, PER_REGION

assert sys.byteorder == "little", "the bytes below are a little-endian machine's"

REGION = Region(0x1000, 0x2000, 0x7F0000001000, 0x3000)
REGION_HEX = "0010000000000000 0020000000000000 00100000007f0000 0030000000000000"

# (payload, its bytes)
ROWS = [
    (Empty(), ""),
    (U64(0x100), "0001000000000000"),
    (VringState(1, 0x8005), "01000000 05800000"),
    (
        VringAddr(1, 1, 0xD, 0x05ED, 0xA7A1, 0x106),
        "01000000 01000000 0d00000000000000 ed05000000000000 a1a7000000000000 0601000000000000",
    ),
    (SingleRegion(REGION), "0000000000000000" + REGION_HEX),
    (MemoryTable(()), "00000000 00000000"),
    (MemoryTable((REGION, REGION)), "02000000 00000000" + REGION_HEX + REGION_HEX),
    (Log(0x1000, 0x20), "0010000000000000 2000000000000000"),
    # 26 bytes of content, and C's six of padding
    (Iotlb(0x1000, 0x2000, 0x3000, 3, 2), "0010000000000000 0020000000000000 0030000000000000 03 02 000000000000"),
    (Config(4, 3, 1, b"abc"), "04000000 03000000 01000000 616263"),
    # how a back-end says no: a header that promises, and nothing behind it
    (Config(4, 3, 0, b""), "04000000 03000000 00000000"),
    (VringArea(0x101, 0x1000, 0x2000), "0101000000000000 0010000000000000 0020000000000000"),
    # 20 bytes in the specification's drawing, 24 in every implementation
    (Inflight(0x1000, 0, 2, 256), "0010000000000000 0000000000000000 0200 0001 00000000"),
    (SharedObject(bytes(range(16))), "000102030405060708090a0b0c0d0e0f"),
    (DeviceStateTransfer(1, 0), "01000000 00000000"),
    (
        Mmap(7, 0x1000, 0x2000, 0x3000, 1),
        "07 00000000000000 0010000000000000 0020000000000000 0030000000000000 0100000000000000",
    ),
    (Opaque(b"\1\2"), "0102"),
]


@pytest.mark.parametrize(("payload", "text"), ROWS, ids=lambda value: type(value).__name__)
def test_bytes(payload, text):
    data = bytes.fromhex(text)
    assert payload.pack() == data
    assert type(payload).unpack(data) == payload


def test_shared_memory_sizes_have_all_256_places():
    config = ShmemConfig((0, 0x1000, 0, 0x2000))
    data = config.pack()
    assert len(data) == 2056
    assert (
        data[:40].hex(" ", 8) == "0200000000000000 0000000000000000 0010000000000000 0000000000000000 0020000000000000"
    )
    assert ShmemConfig.unpack(data).sizes_bytes[:4] == (0, 0x1000, 0, 0x2000)
    with pytest.raises(PayloadError, match="says 3 regions, and 2 have a size"):
        ShmemConfig.unpack(b"\3" + data[1:])


def test_header():
    assert (
        HEADER.pack(FrontendRequest.SET_DEVICE_STATE_FD, 1 | FLAG_NEED_REPLY, 8).hex(" ", 4)
        == "2a000000 09000000 08000000"
    )
    assert REPLY_FLAGS == 5
    assert HEADER.size_bytes == 12


FIXED = [type(payload) for payload, _ in ROWS if not isinstance(payload, Config | MemoryTable | Opaque)]


@pytest.mark.parametrize("kind", FIXED, ids=lambda kind: kind.__name__)
def test_other_lengths_are_refused(kind):
    size = kind.LAYOUT.size_bytes
    for length in {size - 1, size + 1, size + 8} - {-1}:
        with pytest.raises(PayloadError, match=f"has {size} bytes, not {length}"):
            kind.unpack(bytes(length))


@pytest.mark.parametrize("length", [0, 7, 39, 41, 71])
def test_memory_tables_are_as_long_as_they_say(length):
    data = (b"\1" + bytes(7) + bytes(64))[:length]
    with pytest.raises(PayloadError, match="MemoryTable"):
        MemoryTable.unpack(data)


def test_configurations_are_as_long_as_they_say():
    head = bytes.fromhex("00000000 04000000 00000000")
    for length in (1, 3, 5):
        with pytest.raises(PayloadError, match=f"says 4 bytes, and {length} follow"):
            Config.unpack(head + bytes(length))
    with pytest.raises(PayloadError, match="at least 12 bytes"):
        Config.unpack(head[:11])


@given(binary(max_size=200))
def test_any_bytes_are_a_payload_or_an_error(data):
    for name in payloads.__all__:
        kind = getattr(payloads, name)
        if not hasattr(kind, "unpack") or kind is payloads.Payload:
            continue
        try:
            payload = kind.unpack(data)
        except PayloadError:
            continue
        if kind not in (Iotlb, Inflight, Mmap, MemoryTable, SingleRegion, ShmemConfig):  # padding is not kept
            assert payload.pack() == data


@given(integers(0, 2**64 - 1))
def test_every_number_fits_its_place(value):
    assert U64.unpack(U64(value).pack()) == U64(value)


# --- the tables ---


def test_every_request_has_a_row():
    assert set(FRONTEND_REQUESTS) == set(FrontendRequest)
    assert set(BACKEND_REQUESTS) == set(BackendRequest)
    assert [int(request) for request in FrontendRequest] == list(range(1, 46))
    assert [int(request) for request in BackendRequest] == list(range(1, 11))
    assert [int(feature) for feature in ProtocolFeature] == list(range(24))


# the numbers that have been something else somewhere: see the comments in abi/vhost_user.py
TRAPS = [
    (FrontendRequest.GET_SHMEM_CONFIG, 44),
    (FrontendRequest.GET_VRING_BASE_SKIP_DRAIN, 45),
    (FrontendRequest.SET_DEVICE_STATE_FD, 42),
    (FrontendRequest.CHECK_DEVICE_STATE, 43),
    (ProtocolFeature.DEVICE_STATE, 19),
    (ProtocolFeature.GET_VRING_BASE_INFLIGHT, 20),
    (ProtocolFeature.GPA_ADDRESSES, 21),
    (ProtocolFeature.SHMEM, 22),
    (ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN, 23),
]


@pytest.mark.parametrize(("name", "number"), TRAPS, ids=str)
def test_numbers_that_moved(name, number):
    assert int(name) == number


@pytest.mark.parametrize("table", [FRONTEND_REQUESTS, BACKEND_REQUESTS], ids=["front-end", "back-end"])
def test_rows_make_sense(table):
    for request, spec in table.items():
        assert hasattr(spec.payload, "unpack"), request
        fewest, most = spec.fds
        assert (fewest, most) == (PER_REGION, PER_REGION) or 0 <= fewest <= most <= 1, request
        if spec.reply is None:
            assert spec.reply_fds == (0, 0), request
        for kind in (spec.payload, spec.reply):
            if layout := getattr(kind, "LAYOUT", None):
                assert layout.size_bytes <= PAYLOAD_SIZE_MAX


#: The requests that are answered whether or not an acknowledgement was asked for.
ALWAYS_ANSWERED = {
    *("GET_FEATURES", "SET_LOG_BASE", "GET_VRING_BASE", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "IOTLB_MSG"),
    *("GET_CONFIG", "CREATE_CRYPTO_SESSION", "POSTCOPY_ADVISE", "POSTCOPY_END", "GET_INFLIGHT_FD", "GET_MAX_MEM_SLOTS"),
    *("GET_STATUS", "GET_SHARED_OBJECT", "SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE", "GET_SHMEM_CONFIG"),
    "GET_VRING_BASE_SKIP_DRAIN",
}


def test_which_requests_are_always_answered():
    assert {request.name for request, spec in FRONTEND_REQUESTS.items() if spec.reply} == ALWAYS_ANSWERED
