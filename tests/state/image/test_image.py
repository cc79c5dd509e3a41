"""The state image: its bytes written out, whatever is damaged is refused, and a golden file for ever."""

import hashlib
import io
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from vdpabridge.device import PackedBase, QueueSetup, SplitBase
from vdpabridge.state.image.reader import ImageError, ImageReader
from vdpabridge.state.image.writer import ImageFacts, ImageWriter
from vdpabridge.state.snapshot import DeviceSnapshot, QueueSnapshot

GOLDEN = Path(__file__).parent / "golden"
FACTS = ImageFacts(
    DeviceSnapshot(
        2,
        0x1_0000_0000,
        {
            0: QueueSnapshot(QueueSetup(256, 0x1000, 0x2000, 0x3000), SplitBase(77), True),
            2: QueueSnapshot(QueueSetup(64, 0x8000, 0x9000, 0xA000), SplitBase(5), False),
        },
        b"configuration",
    ),
    0x1_0000_0042,
    3,
    1024,
    True,
)
STATE = [b"first", b"second" * 10]


def image_of(facts=FACTS, state=STATE):
    stream = io.BytesIO()
    with ImageWriter(stream.write, facts) as writer:
        for piece in state:
            writer.state(memoryview(piece))
        writer.end()
    return stream.getvalue()


def read(image):
    reader = ImageReader(io.BytesIO(image).read)
    return reader.facts, b"".join(reader.state()), reader.digest


def part(kind, value, selector=bytes(8), flags=0):
    return struct.pack("<HBB8sI", kind, flags, 0, selector, len(value)) + value


def index(number):
    return struct.pack("<II", number, 0)


def sealed(body, state_bytes=0, parts=None):
    """``body`` (a list of parts) with the header and a right end."""
    head = b"vdpaIMG\n" + struct.pack("<HHI", 1, 1, 0)
    count = len(body) if parts is None else parts
    content = head + b"".join(body) + struct.pack("<HBB8sI", 0xF0FF, 0, 0, bytes(8), 48)
    content += struct.pack("<QQ", count, state_bytes)
    return content + hashlib.sha256(content).digest()


BODY = [
    part(0xF000, struct.pack("<5I", 2, 1, 3, 1024, 13)),
    part(0x100, struct.pack("<Q", 0x1_0000_0042), flags=1),
    part(0x101, struct.pack("<Q", 0x1_0000_0000)),
    part(0x104, struct.pack("<4H3Q", 256, 0xFFFF, 1, 0, 0x1000, 0x2000, 0x3000), index(0)),
    part(0x104, struct.pack("<4H3Q", 64, 0xFFFF, 0, 0, 0x8000, 0x9000, 0xA000), index(2)),
    part(0xF001, struct.pack("<II", 77, 0), index(0)),
    part(0xF001, struct.pack("<II", 5, 0), index(2)),
    part(0xF002, b"configuration"),
    part(0xF003, b"first", index(0)),
    part(0xF003, b"second" * 10, index(1)),
]


def test_the_bytes():
    assert image_of() == sealed(BODY, 65)


def test_what_is_written_is_read():
    facts, state, digest = read(image_of())
    assert facts == FACTS
    assert state == b"".join(STATE)
    assert digest == image_of()[-32:]


PACKED_FACTS = ImageFacts(
    DeviceSnapshot(
        1,
        0x5_0000_0000,
        {1: QueueSnapshot(QueueSetup(100, 0x1000, 0x2000, 0x3000), PackedBase(5, False, 6, True), True)},
        b"",
    ),
    None,
    2,
    256,
    False,
)


STARTED_FACTS = replace(FACTS, snapshot=replace(FACTS.snapshot, started=True))


@pytest.mark.parametrize(
    ("name", "facts", "state"),
    [
        ("version-1", FACTS, STATE),
        ("version-1-packed", PACKED_FACTS, []),
        ("version-1-status", STARTED_FACTS, STATE),
    ],
)
def test_the_golden_files(name, facts, state):
    """Version 1, as it was written once: readers have to take it for ever."""
    assert read((GOLDEN / name).read_bytes())[:2] == (facts, b"".join(state))


@pytest.mark.parametrize(("started", "status"), [(True, b"\x0f"), (False, b"\x0b")])
def test_the_status(started, status):
    facts = replace(FACTS, snapshot=replace(FACTS.snapshot, started=started))
    assert image_of(facts) == sealed([*BODY[:3], part(0x103, status, flags=1), *BODY[3:]], 65)
    assert read(image_of(facts))[0] == facts


def test_a_packed_position():
    assert part(0xF001, struct.pack("<II", 5 | 6 << 16 | 1 << 31, 1), index(1)) in image_of(PACKED_FACTS, [])


def test_a_device_without_state():
    facts = ImageFacts(DeviceSnapshot(None, 1 << 32, {}, b""), None, 1, 256, False)
    assert read(image_of(facts, []))[:2] == (facts, b"")


def test_state_is_cut_into_parts_that_fit_into_memory():
    state = bytes(range(256)) * 10000
    image = image_of(state=[state])
    reader = ImageReader(io.BytesIO(image).read)
    pieces = list(reader.state())
    assert [len(piece) for piece in pieces] == [1 << 20, 1 << 20, len(state) - (2 << 20)]
    assert b"".join(pieces) == state


def test_every_byte_counts():
    image = image_of()
    for at in range(len(image)):
        for bit in (0, 7):
            bent = bytearray(image)
            bent[at] ^= 1 << bit
            with pytest.raises(ImageError):
                read(bytes(bent))
    for size in range(len(image)):
        with pytest.raises(ImageError):
            read(image[:size])
    with pytest.raises(ImageError, match="follows the end"):
        read(image + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_that_are_moved_or_doubled(data):
    image = image_of()
    a, b = sorted(data.draw(st.lists(st.integers(0, len(image)), min_size=2, max_size=2)))
    to = data.draw(st.integers(0, len(image)))
    doubled = image[:to] + image[a:b] + image[to:]
    without = image[:a] + image[b:]
    for bent in (doubled, without, without[:to] + image[a:b] + without[to:]):
        if bent != image:
            with pytest.raises(ImageError):
                read(bent)


addresses = st.integers(0, (1 << 64) - 1)
split = st.builds(
    QueueSnapshot,
    st.builds(QueueSetup, st.integers(0, 15).map(lambda bit: 1 << bit), addresses, addresses, addresses),
    st.builds(SplitBase, st.integers(0, 0xFFFF)),
    st.booleans(),
)
packed = st.builds(
    QueueSnapshot,
    st.builds(QueueSetup, st.integers(1, 0x8000), addresses, addresses, addresses),
    st.builds(PackedBase, st.integers(0, 0x7FFF), st.booleans(), st.integers(0, 0x7FFF), st.booleans()),
    st.booleans(),
)
PACKED = 1 << 34


def facts_with(queues, ring):
    return st.builds(
        lambda device_id, features, those, config, more, started: ImageFacts(
            DeviceSnapshot(device_id, features & ~PACKED | ring, dict(enumerate(those)), config, started),
            None if more is None else features & ~PACKED | ring | more,
            len(those),
            0x8000,
            True,
        ),
        st.none() | st.integers(0, 0xFFFFFFFE),
        addresses,
        st.lists(queues, max_size=4),
        st.binary(max_size=300),
        st.none() | addresses,
        st.none() | st.booleans(),
    )


facts = facts_with(split, 0) | facts_with(packed, PACKED)


@settings(max_examples=200, deadline=None)
@given(facts, st.lists(st.binary(min_size=1, max_size=5000), max_size=4))
def test_any_device(these, state):
    image = image_of(these, state)
    assert read(image)[:2] == (these, b"".join(state))
    assert image_of(*read(image)[:1], [read(image)[1]] if state else []) == image_of(
        these, [b"".join(state)] if state else []
    )


def replaced(position, new):
    return [*BODY[:position], *([new] if isinstance(new, bytes) else new), *BODY[position + 1 :]]


WRONG = {
    "another magic": b"vdpaIMG\r" + image_of()[8:],
    "a newer version that is not for us": sealed([])[:8] + struct.pack("<HHI", 9, 2, 0) + image_of()[16:],
    "a version below its oldest reader's": sealed([])[:8] + struct.pack("<HHI", 0, 1, 0) + image_of()[16:],
    "an unknown part that may not be skipped": sealed([*BODY[:2], part(0x777, b"?"), *BODY[2:]], 65),
    "a flag nobody knows": sealed([part(0x777, b"?", flags=2), *BODY], 65),
    "a part that is too long": sealed([part(0x777, bytes((1 << 20) + 1), flags=1), *BODY], 65),
    "no identity": sealed(BODY[1:], 65),
    "two identities": sealed([BODY[0], *BODY], 65),
    "no accepted features": sealed(replaced(2, []), 65),
    "features out of order": sealed([BODY[0], BODY[2], BODY[1], *BODY[3:]], 65),
    "a status that is said to be needed": sealed([*BODY[:3], part(0x103, b"\x0f"), *BODY[3:]], 65),
    "a status of two bytes": sealed([*BODY[:3], part(0x103, b"\x0f\0", flags=1), *BODY[3:]], 65),
    "a status before the features": sealed([*BODY[:2], part(0x103, b"\x0f", flags=1), *BODY[2:]], 65),
    **{
        f"a status of {status:#x}": sealed([*BODY[:3], part(0x103, bytes([status]), flags=1), *BODY[3:]], 65)
        for status in (0, 1, 3, 7, 0x1F, 0x4F, 0x8F)
    },
    "a queue without a position": sealed(replaced(6, []), 65),
    "a position without a queue": sealed(replaced(4, []), 65),
    "a queue twice": sealed([*BODY[:4], *BODY[3:]], 65),
    "queues out of order": sealed([*BODY[:3], BODY[4], BODY[3], *BODY[5:]], 65),
    "a queue beyond the number of queues": sealed(
        [*replaced(4, part(0x104, BODY[4][16:], index(3)))[:6], part(0xF001, BODY[6][16:], index(3)), *BODY[7:]], 65
    ),
    "a queue of nothing": sealed(replaced(3, part(0x104, bytes(32), index(0))), 65),
    "a queue that is enabled twice": sealed(
        replaced(3, part(0x104, struct.pack("<4H3Q", 8, 0xFFFF, 2, 0, 0, 0, 0), index(0))), 65
    ),
    "a split position that is too large": sealed(replaced(5, part(0xF001, struct.pack("<II", 1 << 16, 0), index(0))), 65),
    "a position of a packed ring without packed rings": sealed(replaced(5, part(0xF001, struct.pack("<II", 5, 1), index(0))), 65),
    "a queue that is no power of two": sealed(
        replaced(3, part(0x104, struct.pack("<4H3Q", 100, 0xFFFF, 1, 0, 0, 0, 0), index(0))), 65
    ),
    "a queue above the largest": sealed(
        replaced(3, part(0x104, struct.pack("<4H3Q", 2048, 0xFFFF, 1, 0, 0, 0, 0), index(0))), 65
    ),
    "features that were not offered": sealed(replaced(1, part(0x100, struct.pack("<Q", 1), flags=1)), 65),
    "a part that is said to be optional": sealed(replaced(2, part(0x101, struct.pack("<Q", 0x1_0000_0000), flags=1)), 65),
    "a configuration space of another size": sealed(replaced(7, part(0xF002, b"short")), 65),
    "an empty piece of state": sealed([*BODY, part(0xF003, b"", index(2))], 65),
    "a piece of state with another number": sealed(replaced(9, part(0xF003, b"second" * 10, index(7))), 65),
    "state that was not announced": sealed(replaced(0, part(0xF000, struct.pack("<5I", 2, 0, 3, 1024, 13))), 65),
    "fewer parts than it says": sealed(BODY, 65, parts=11),
    "another size of state than it says": sealed(BODY, 64),
    "another digest": sealed(BODY, 65)[:-1] + b"\0",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image(name):
    with pytest.raises(ImageError) as caught:
        read(WRONG[name])
    assert caught.value.offset <= len(WRONG[name])


def test_unknown_parts_that_may_be_skipped():
    extra = part(0x777, b"from the future", flags=1)
    assert read(sealed([BODY[0], extra, *BODY[1:9], extra, *BODY[9:], extra], 65))[:2] == (FACTS, b"".join(STATE))


def test_a_newer_version_that_is_for_us_as_well():
    image = bytearray(image_of())
    image[8:10] = struct.pack("<H", 9)
    image[-32:] = hashlib.sha256(image[:-32]).digest()
    assert read(bytes(image))[0] == FACTS
