"""Layouts, vring bases, names, and the refusal of machines whose ioctl encoding ioctl-opt does not know."""

import pytest
from hypothesis import given
from hypothesis.strategies import booleans, integers

from vdpabridge.abi.features import feature_names
from vdpabridge.abi.ioc import check_machine
from vdpabridge.abi.layout import Layout
from vdpabridge.abi.vhost import BACKEND_FEATURE_NAMES, VHOST_VRING_ADDR, VhostIoctl
from vdpabridge.abi.virtio import DEVICE_NAMES, device_name, status_names
from vdpabridge.abi.virtio_blk import VIRTIO_BLK_CONFIG
from vdpabridge.abi.vring_base import PackedBase, SplitBase, decode_base

indices_15 = integers(0, 0x7FFF)


@pytest.mark.parametrize("machine", ["ppc64le", "ppc", "mips64", "sparc64", "alpha", "parisc64"])
def test_machines_with_another_ioctl_encoding_are_refused(machine):
    with pytest.raises(ImportError, match=f"{machine}: this architecture encodes ioctl numbers in its own way"):
        check_machine(machine)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64", "s390x", "armv7l", "loongarch64"])
def test_other_machines_are_not(machine):
    check_machine(machine)


# (base, word), the word written out by hand: used half above, wrap counters on top of each half
BASES = [
    (SplitBase(0), 0x00000000),
    (SplitBase(0xFFFF), 0x0000FFFF),
    (PackedBase(), 0x80008000),
    (PackedBase(1, True, 0, True), 0x80008001),
    (PackedBase(0, False, 0, False), 0x00000000),
    (PackedBase(0x7FFF, False, 1, True), 0x80017FFF),
    (PackedBase(2, True, 0x7FFF, False), 0x7FFF8002),
]


@pytest.mark.parametrize(("base", "word"), BASES, ids=str)
def test_vring_base_words(base, word):
    assert base.encode() == word
    assert decode_base(word, packed=isinstance(base, PackedBase)) == base


@given(indices_15, booleans(), indices_15, booleans())
def test_packed_round_trip(avail, avail_wrap, used, used_wrap):
    base = PackedBase(avail, avail_wrap, used, used_wrap)
    assert decode_base(base.encode(), packed=True) == base


@given(integers(0, 0xFFFFFFFF))
def test_every_word_decodes(word):
    assert decode_base(word, packed=True).encode() == word
    assert decode_base(word, packed=False).encode() == word & 0xFFFF


@pytest.mark.parametrize("base", [SplitBase(0x10000), SplitBase(-1), PackedBase(0x8000), PackedBase(0, True, -1)])
def test_indices_that_do_not_fit(base):
    with pytest.raises(ValueError, match="does not fit"):
        base.encode()


def test_avail_comes_after_used_in_the_address_structure():
    data = VHOST_VRING_ADDR.pack(1, 0, 0xD, 0x0A, 0xAA, 0)
    assert data.hex(" ", 8) == "0100000000000000 0d00000000000000 0a00000000000000 aa00000000000000 0000000000000000"


def test_a_short_configuration_space_decodes_as_far_as_it_goes():
    config = (0x40000).to_bytes(8, "little") + (4096).to_bytes(4, "little") + b"\1\2"
    assert VIRTIO_BLK_CONFIG.decode(config) == {"capacity": 0x40000, "size_max": 4096}
    assert len(VIRTIO_BLK_CONFIG.decode(bytes(96))) == len(VIRTIO_BLK_CONFIG.fields)


def test_layout_knows_its_offsets():
    layout = Layout("example", "<", (("a", "B"), ("", "3x"), ("b", "I")))
    assert (layout.offsets, layout.size_bytes) == ({"a": 0, "b": 4}, 8)
    assert layout.unpack(layout.pack(7, 9)) == (7, 9)
    assert repr(layout) == "<struct example: 8 bytes>"


def test_names():
    assert feature_names(1 << 9 | 1 << 32 | 1 << 61, 2) == ["FLUSH", "VERSION_1", "bit_61"]
    assert feature_names(1 << 5 | 1 << 33, 1) == ["MAC", "ACCESS_PLATFORM"]
    assert feature_names(0) == []
    assert (device_name(26), device_name(1), device_name(2), device_name(63)) == ("fs", "network", "block", "id-63")
    assert status_names(0xF) == "ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK"
    assert status_names(0) == "reset"
    assert len(set(DEVICE_NAMES.values())) == len(DEVICE_NAMES)
    assert BACKEND_FEATURE_NAMES[8] == "IOTLB_PERSIST"
    assert VhostIoctl(0xAF7D).name == "VHOST_VDPA_SUSPEND"
