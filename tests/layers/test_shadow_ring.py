"""What a device sees of its guest's ring, what the guest sees of the device, and what is in the log: byte by byte."""

import os
import struct
from contextlib import contextmanager

import pytest

from vdpabridge.abi.virtio_ring import VRING_DESC, VRING_DESC_F_WRITE
from vdpabridge.device import DirtyLog
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.layers.shadow_ring import ShadowRing
from vdpabridge.linux.mappings import memory_file
from vdpabridge.rings.descriptors import RingBroken
from vdpabridge.rings.guest_view import GuestView

PAGE = 4096
BASE = 0x10_0000
MEMORY_BYTES = 1 << 20


class Bench:
    """A guest's driver, and a device that is played by hand."""

    def __init__(self, memory, queue, view, log_fd, *, used_so_far=0, event_index=False):
        self.memory, self.guest, self.view, self._log_fd = memory, queue, view, log_fd
        for words in (queue._avail, queue._used_words):
            words[1] = used_so_far
        queue.avail_index = queue.used_index = used_so_far
        self.avail = memoryview(bytearray(4 + 2 * queue.size + 2))
        self.used = memoryview(bytearray(4 + 8 * queue.size + 2))
        self.ring = ShadowRing(view, queue.setup, self.avail, self.used, event_index=event_index)

    def device_sees(self):
        """(available index, entries)."""
        words = self.avail.cast("H")
        return words[1], list(words[2 : 2 + self.guest.size])

    def use(self, head, written=0):
        """The device uses a chain."""
        index = self.used.cast("H")[1]
        struct.pack_into("<II", self.used, 4 + 8 * (index % self.guest.size), head, written)
        self.used.cast("H")[1] = (index + 1) & 0xFFFF

    def marked(self):
        """The pages that were marked since the last look."""
        size = os.fstat(self._log_fd).st_size
        content = os.pread(self._log_fd, size, 0)
        os.pwrite(self._log_fd, bytes(size), 0)
        return {8 * at + bit for at, byte in enumerate(content) for bit in range(8) if byte >> bit & 1}

    def page_of_used(self, offset):
        return (self.guest.setup.used_address + offset) // PAGE


@contextmanager
def bench(size=4, **options):
    log_bytes = (BASE + MEMORY_BYTES) // PAGE // 8
    with GuestMemory(MEMORY_BYTES, BASE) as memory, SplitQueue(memory, size) as queue:
        view = GuestView()
        view.map([memory.region])
        log_fd = memory_file("log", log_bytes)
        view.set_log(DirtyLog(log_fd, log_bytes))
        made = Bench(memory, queue, view, log_fd, **options)
        made.marked()
        yield made
        view.close()
        os.close(log_fd)


def buffers(bench, count, pages=1):
    return [(bench.memory.allocate(pages * PAGE, PAGE), pages * PAGE) for _ in range(count)]


def test_nothing_is_available_at_first():
    with bench(used_so_far=6) as it:
        (buffer,) = buffers(it, 1)
        it.guest.add([buffer])
        assert it.device_sees()[0] == 6
        assert it.used.cast("H")[1] == 6


@pytest.mark.parametrize("start", [0, 3, 0xFFFE])
def test_what_is_available_is_copied_past_the_rings_end_too(start):
    with bench(used_so_far=start) as it:
        heads = [it.guest.add([buffer]) for buffer in buffers(it, 3)]
        assert it.ring.forward()
        index, entries = it.device_sees()
        assert index == (start + 3) & 0xFFFF
        assert [entries[(start + at) % 4] for at in range(3)] == heads
        assert not it.ring.forward()


@pytest.mark.parametrize("start", [0, 3, 0xFFFE])
def test_what_was_used_is_copied_past_the_rings_end_too(start):
    with bench(used_so_far=start) as it:
        heads = [it.guest.add([], [buffer]) for buffer in buffers(it, 3)]
        it.ring.forward()
        assert not it.ring.publish()
        for head in reversed(heads):
            it.use(head, 100 + head)
        assert it.ring.publish()
        assert list(it.guest.used()) == [(head, 100 + head) for head in reversed(heads)]
        assert not it.ring.publish()


def test_the_pages_of_what_the_device_may_write_are_marked():
    with bench() as it:
        readable, small, large = (buffers(it, 1, pages)[0] for pages in (1, 1, 3))
        head = it.guest.add([readable], [(small[0] + 10, 1), (large[0] + PAGE - 1, PAGE + 2)])
        it.ring.forward()
        assert it.marked() == set()
        it.use(head)
        it.ring.publish()
        pages = {small[0] // PAGE, *range(large[0] // PAGE, large[0] // PAGE + 3)}
        assert it.marked() == pages | {it.page_of_used(0)}


def test_the_used_ring_is_marked_where_it_was_written():
    """A large one has its index in one page and its entries in others."""
    with bench(size=1024, used_so_far=700) as it:
        (buffer,) = buffers(it, 1)
        head = it.guest.add([buffer])
        it.ring.forward()
        it.use(head)
        it.ring.publish()
        assert it.page_of_used(4 + 8 * 700) != it.page_of_used(0)
        assert it.marked() == {it.page_of_used(0), it.page_of_used(4 + 8 * 700)}


def test_the_mark_comes_before_the_guest_is_told():
    """Whoever sees the index, and stops the guest, finds the pages in the log."""
    with bench() as it:
        (buffer,) = buffers(it, 1)
        head = it.guest.add([], [buffer])
        it.ring.forward()
        it.use(head)
        seen = []
        written = it.view.written

        def note(address, size_bytes):
            seen.append((address, it.guest.device_used_index))
            written(address, size_bytes)

        it.view.written = note
        it.ring.publish()
        assert seen[0] == (buffer[0], 0)


@pytest.mark.parametrize(
    ("entry", "why"),
    [(4, "descriptor 4 of a table of 4"), (0xFFFF, "descriptor 65535 of a table of 4")],
)
def test_a_descriptor_that_is_none_is_not_shown_to_the_device(entry, why):
    with bench() as it:
        (buffer,) = buffers(it, 1)
        it.guest.add([buffer])
        it.guest._avail[2] = entry
        with pytest.raises(RingBroken, match=why):
            it.ring.forward()
        assert it.device_sees()[0] == 0


@pytest.mark.parametrize("index", [5, 0x8000, 0xFFFF])
def test_more_than_the_ring_holds_is_not_shown_to_the_device(index):
    with bench() as it:
        it.guest._avail[1] = index
        with pytest.raises(RingBroken, match=f"the available index went from 0 to {index}"):
            it.ring.forward()
        assert it.device_sees()[0] == 0


@pytest.mark.parametrize("index", [2, 0xFFFF])
def test_a_device_that_uses_what_it_was_not_given(index):
    with bench() as it:
        (buffer,) = buffers(it, 1)
        it.guest.add([buffer])
        it.ring.forward()
        it.used.cast("H")[1] = index
        with pytest.raises(ValueError, match=f"the used index went from 0 to {index}, of 1 available"):
            it.ring.publish()
        assert it.guest.device_used_index == 0


def test_many_at_once_are_shown_in_batches():
    """Between two of them, others have their turn."""
    with bench(size=1024, used_so_far=0xFF00) as it:
        heads = [it.guest.add([], [buffer]) for buffer in buffers(it, 1) * 600]
        it.ring.forward()
        for head in heads:
            it.use(head)
        shown = []
        while it.ring.publish():
            shown.append(it.guest.device_used_index)
        assert shown == [0, 256, 344]
        assert it.ring.unpublished == 0
        assert [head for head, _ in it.guest.used()] == heads


def test_a_chain_of_more_bytes_than_there_can_be_makes_the_log_incomplete():
    with bench() as it:
        head = it.guest.add([], buffers(it, 2))
        for descriptor in it.guest._chains[head]:
            address, _, flags, following = VRING_DESC.struct.unpack_from(it.guest._desc, descriptor * 16)
            VRING_DESC.struct.pack_into(it.guest._desc, descriptor * 16, address, 0x9000_0000, flags, following)
        it.view.set_log(None)
        it.ring.forward()
        it.use(head)
        it.ring.publish()
        assert it.ring.incomplete == "a chain of more than 4294967296 bytes"


@pytest.mark.parametrize("breaks", ["points out of the table", "is not mapped", "is beyond the log"])
def test_a_chain_that_cannot_be_followed_makes_the_log_incomplete(breaks):
    with bench() as it:
        (buffer,) = buffers(it, 1)
        head = it.guest.add([], [buffer])
        it.ring.forward()
        address, flags, following = buffer[0], VRING_DESC_F_WRITE, 0
        if breaks == "points out of the table":
            flags, following = flags | 1, 9
        elif breaks == "is not mapped":
            # the device has written somewhere, and the guest has changed its descriptor since
            address = 1 << 40
        else:
            it.view.set_log(DirtyLog(it._log_fd, BASE // PAGE // 8 + 1))
            address = BASE + MEMORY_BYTES - PAGE
        VRING_DESC.struct.pack_into(it.guest._desc, head * 16, address, PAGE, flags, following)
        it.use(head)
        assert it.ring.publish()
        assert it.ring.incomplete != ""
        assert [head for head, _ in it.guest.used()] == [head]


def test_memory_that_moves_is_followed():
    with bench() as it, GuestMemory(MEMORY_BYTES, BASE) as other:
        (buffer,) = buffers(it, 1)
        head = it.guest.add([buffer])
        other.view[:] = it.memory.view
        it.view.unmap([it.memory.region])
        with pytest.raises(RingBroken, match="are not mapped"):
            it.ring.forward()
        it.view.map([other.region])
        assert it.ring.forward()
        it.use(head, 77)
        assert it.ring.publish()
        used = other.slice(it.guest.setup.used_address, 12)
        assert bytes(used) == struct.pack("<HHII", 0, 1, head, 77)
        assert it.guest.device_used_index == 0, "that was the memory before"


def test_the_event_indices():
    with bench(used_so_far=6, event_index=True) as it:
        avail_event = 4 + 8 * it.guest.size
        read = lambda: struct.unpack_from("<H", it.guest._used, avail_event)[0]  # noqa: E731
        assert (read(), it.avail.cast("H")[2 + it.guest.size]) == (6, 6)
        heads = [it.guest.add([buffer]) for buffer in buffers(it, 2)]
        it.ring.forward()
        assert (read(), it.avail.cast("H")[2 + it.guest.size]) == (8, 6)
        assert it.page_of_used(avail_event) in it.marked()
        it.use(heads[0])
        it.ring.publish()
        assert (read(), it.avail.cast("H")[2 + it.guest.size]) == (8, 7)


def test_without_event_indices_nobody_asks_for_silence():
    with bench() as it:
        assert it.guest._used_words[0] == 0
        assert it.avail.cast("H")[0] == 0
