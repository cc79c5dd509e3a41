"""A message as a line for people."""

import re

import pytest

from vdpabridge.abi.vhost_user import FrontendRequest as F
from vdpabridge.abi.vhost_user_payloads import U64, Config, MemoryTable, Region, VringState
from vdpabridge.errors import VdpaBridgeError
from vdpabridge.export.vhost_user.trace import line

BEGIN_NS = 1_700_000_000_000_000_123
BLK_CONFIG = (2048).to_bytes(8, "little") + bytes(12) + (512).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("request_", "payload", "answer", "error", "expected"),
    [
        (F.SET_FEATURES, U64(1 << 32 | 1 << 30), None, None, "0x140000000 [VERSION_1 PROTOCOL_FEATURES] -> ok"),
        (F.GET_FEATURES, None, U64(1 << 9), None, "-> 0x200 [FLUSH]"),
        (F.GET_PROTOCOL_FEATURES, None, U64(1 << 3), None, "-> 0x8 [REPLY_ACK]"),
        (F.GET_QUEUE_NUM, None, U64(2), None, "-> 0x2"),
        (F.SET_VRING_NUM, VringState(1, 256), None, None, "index=1 num=256 -> ok"),
        (
            F.SET_MEM_TABLE,
            MemoryTable((Region(0x10000, 4096, 0x7F0000000000, 0),)),
            None,
            VdpaBridgeError("map", why="no"),
            "regions=[{guest_address=0x10000 size_bytes=0x1000 user_address=0x7f0000000000 mmap_offset=0}] "
            "-> failed: map: no",
        ),
        (
            F.GET_CONFIG,
            Config(0, 24, 0, bytes(24)),
            Config(0, 24, 0, BLK_CONFIG),
            None,
            "offset=0 size=24 -> offset=0 size=24 capacity=2048 blk_size=512",
        ),
        (F.SET_CONFIG, Config(4, 2, 0, b"\x01\xff"), None, None, "offset=4 size=2 data=01ff -> ok"),
    ],
)
def test_line(request_, payload, answer, error, expected):
    text = line(request_, payload, answer, error, device_id=2, begin_ns=BEGIN_NS)
    found = re.fullmatch(rf"1700000000\.000000123 {request_.name} (.*) \(\d+ ns\)", text)
    assert found, text
    assert found[1] == expected
