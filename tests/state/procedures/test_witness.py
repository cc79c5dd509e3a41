"""What the guest's rings say of work: every combination of chains, wraps and counters, against a model of a ring."""

import itertools
import os
import struct

import pytest
from hypothesis import given, settings, strategies as st

from vdpabridge.device import MemoryRegion, PackedBase, QueueSetup, SplitBase
from vdpabridge.state.procedures.witness import Evidence, Witness
from vdpabridge.state.snapshot import DeviceSnapshot, QueueSnapshot

from ...support.transitions import shared_file

AVAIL, USED = 1 << 7, 1 << 15
BASE = 0x4000_0000
REGION_BYTES = 1 << 16


class PackedRing:
    """A packed ring in ``file``, by the book (VIRTIO 1.4, 2.8): who makes available and who uses it write its flags."""

    def __init__(self, file, size):
        self.file = file
        self.size = size
        self.avail = self.used = 0
        self.avail_wrap = self.used_wrap = True
        self.chains = []
        self.free = size

    def write_flags(self, index, flags):
        os.pwrite(self.file, struct.pack("<H", flags), 16 * index + 14)

    def make_available(self, count):
        """A chain of ``count`` descriptors; the driver writes the flags of all of them."""
        if count > self.free:
            return
        for _ in range(count):
            self.write_flags(self.avail, AVAIL if self.avail_wrap else USED)
            self.avail, self.avail_wrap = self.after(self.avail, 1, self.avail_wrap)
        self.free -= count
        self.chains.append(count)

    def use(self):
        """The device answers one chain: the flags of the next descriptor alone. How many it had, 0 where none is."""
        if not self.chains:
            return 0
        count = self.chains.pop(0)
        self.write_flags(self.used, AVAIL | USED if self.used_wrap else 0)
        self.used, self.used_wrap = self.after(self.used, count, self.used_wrap)
        self.free += count
        return count

    def after(self, index, count, wrap):
        return (index + count, wrap) if index + count < self.size else (index + count - self.size, not wrap)

    @property
    def base(self):
        return PackedBase(self.avail, self.avail_wrap, self.used, self.used_wrap)


def snapshot_of(*bases, size=8):
    queues = {
        index: QueueSnapshot(
            QueueSetup(size, BASE + 0x1000 * index, BASE + 0x800, BASE + 0x1000 * index + 0xC00), base, True
        )
        for index, base in enumerate(bases)
    }
    return DeviceSnapshot(2, 1 << 34 if isinstance(bases[0], PackedBase) else 0, queues, b"")


def region(file, size=REGION_BYTES):
    return MemoryRegion(BASE, size, file)


ACTS = st.lists(st.one_of(st.integers(1, 5), st.just("use")), max_size=40)


@settings(max_examples=400)
@given(size=st.integers(1, 8), before=ACTS, after=ACTS)
def test_a_packed_ring_tells_of_work_and_of_nothing_else(size, before, after):
    with shared_file(REGION_BYTES) as file:
        ring = PackedRing(file, size)
        for act in before:
            ring.use() if act == "use" else ring.make_available(act)
        witness = Witness(snapshot_of(ring.base, size=size), [region(file)])
        answered = 0
        for act in after:
            if act == "use":
                answered += ring.use()
            else:
                ring.make_available(act)
            # after more than a whole round some rings look as before: that is a limit of what a ring can tell
            if answered <= size:
                assert witness.evidence() is (Evidence.WORK if answered else Evidence.NONE)
        witness.close()


@pytest.mark.parametrize(("wrap", "queued"), list(itertools.product([True, False], [True, False])))
def test_the_first_answer_shows_for_every_wrap_counter(wrap, queued):
    """Before and after the guest has made the descriptor available."""
    with shared_file(REGION_BYTES) as file:
        ring = PackedRing(file, 4)
        if not wrap:
            for _ in range(4):
                ring.make_available(1)
                ring.use()
        if queued:
            ring.make_available(1)
        assert ring.base.used_wrap is wrap
        witness = Witness(snapshot_of(ring.base, size=4), [region(file)])
        assert witness.evidence() is Evidence.NONE
        if not queued:
            ring.make_available(1)
            assert witness.evidence() is Evidence.NONE, "the guest alone has written there"
        ring.use()
        assert witness.evidence() is Evidence.WORK
        witness.close()


def test_an_answer_that_went_round_once_shows():
    with shared_file(REGION_BYTES) as file:
        ring = PackedRing(file, 2)
        witness = Witness(snapshot_of(ring.base, size=2), [region(file)])
        for _ in range(2):
            ring.make_available(1)
            ring.use()
        assert ring.used == 0
        assert witness.evidence() is Evidence.WORK
        ring.make_available(1)
        assert witness.evidence() is Evidence.WORK
        witness.close()


def test_a_split_ring_tells_by_its_used_index():
    with shared_file(REGION_BYTES) as file:
        witness = Witness(snapshot_of(SplitBase(7)), [region(file)])
        os.pwrite(file, b"\1\0\x07\0", 0x800)  # the available ring is the guest's
        assert witness.evidence() is Evidence.NONE
        os.pwrite(file, struct.pack("<H", 8), 0xC00 + 2)
        assert witness.evidence() is Evidence.WORK
        witness.close()


@pytest.mark.parametrize("base", [SplitBase(0), PackedBase()])
def test_a_ring_that_cannot_be_read_is_an_answer_of_its_own(base):
    with shared_file(REGION_BYTES) as file:
        for regions in ([], [MemoryRegion(BASE + 0x10_0000, 4096, file)], [MemoryRegion(BASE, 4096, file, 1 << 30)]):
            witness = Witness(snapshot_of(base), regions)
            assert witness.evidence() is Evidence.UNREADABLE
            witness.close()


def test_work_on_one_queue_counts_whatever_another_says():
    with shared_file(REGION_BYTES) as file:
        witness = Witness(snapshot_of(SplitBase(0), SplitBase(0)), [region(file, 0x1000)])
        assert witness.evidence() is Evidence.UNREADABLE
        os.pwrite(file, struct.pack("<H", 1), 0xC00 + 2)
        assert witness.evidence() is Evidence.WORK
        witness.close()


def test_a_device_without_queues_has_done_no_work():
    witness = Witness(DeviceSnapshot(2, 0, {}, b""), [])
    assert witness.evidence() is Evidence.NONE
    witness.close()
