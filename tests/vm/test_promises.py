"""What the kernel promises, each promise by itself: by its requests alone, with a ring, and without the driver.

The driver kicks again after RESUME, reads the status back and repairs the IOTLB: with it, a kernel that breaks one of
these promises may pass every other test.
"""

import time
from contextlib import ExitStack
from errno import EFAULT
from pathlib import Path

import pytest

from vdpabridge.abi.vhost import VhostIoctl as Ioctl
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..support.release import since
from .conftest import MEMORY_BYTES, PINS, WITH_STATE
from .raw import BATCH_BEGIN, BATCH_END, INVALIDATE, LIVE, SETTLE_S, raw, refuses, running_raw

RESUMES = since((6, 3), True, before=False)


@pytest.fixture
def disk(block_node):
    with running_raw(block_node) as it:
        it.do()
        yield it


# --- suspend ---


def test_nothing_happens_while_it_is_suspended(disk):
    disk.suspend()
    disk.take_calls()
    before = bytes(disk.memory.view)
    disk.requests(10)
    asked = bytes(disk.memory.view)
    assert asked != before
    disk.queue.kick()
    time.sleep(SETTLE_S)
    assert bytes(disk.memory.view) == asked, "the device wrote into the guest's memory"
    assert not disk.was_called, "the device called the guest"
    assert disk.driver.done() == []


def test_what_it_has_taken_it_has_answered(disk):
    """Requests that are being done when it is suspended: all that it has taken are in the used ring."""
    for _ in range(20):
        disk.requests(15)
        disk.queue.kick()
        disk.suspend()
        taken = disk.device.base(0)
        assert taken == disk.queue.device_used_index
        time.sleep(0.001)
        assert (disk.device.base(0), disk.queue.device_used_index) == (taken, taken)
        if RESUMES:
            disk.resume()
        else:
            disk.start(taken)
        if not WITH_STATE:
            # up to 7.2, vdpa_sim's worker takes five requests and schedules itself again; if the device is suspended in
            # between, RESUME does not make it look: it remembers only kicks that come while it is suspended. This
            # project's patches mend that
            disk.queue.kick()
        disk.answers(disk.queue.pending)


def test_a_second_suspend_changes_nothing(disk):
    disk.suspend()
    base = disk.device.base(0)
    disk.suspend()
    disk.requests(1)
    disk.queue.kick()
    time.sleep(SETTLE_S)
    assert (disk.driver.done(), disk.device.base(0)) == ([], base)


def test_a_base_that_is_set_is_the_one_that_is_read(disk):
    disk.suspend()
    for base in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        disk.device.of_queue(Ioctl.VHOST_SET_VRING_BASE, 0, base)
        assert disk.device.base(0) == base


def test_a_reset_ends_a_suspend(disk):
    disk.suspend()
    base = disk.device.base(0)
    disk.start(base)
    disk.do()


def test_a_close_ends_a_suspend(block_node):
    with running_raw(block_node) as disk:
        disk.do()
        disk.suspend()
    with running_raw(block_node) as disk:
        disk.do()


# --- several queues ---


def test_all_queues_are_suspended(net_node):
    """A network card: what is sent comes back on the other queue, and not while it is suspended."""
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
        receive, send = (stack.enter_context(SplitQueue(memory, 16)) for _ in range(2))
        device = stack.enter_context(raw(net_node))
        device.negotiate()
        device.map(memory)
        for index, queue in enumerate((receive, send)):
            device.attach(queue, index)
        device.status(LIVE)
        room, frame = memory.allocate(2048), memory.allocate(2048)

        def exchange():
            receive.add([], [(room, 2048)])
            receive.kick()
            send.add([(frame, 100)])
            send.kick()

        exchange()
        deadline = time.monotonic() + 10
        while send.device_used_index < 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        device.ask(Ioctl.VHOST_VDPA_SUSPEND)
        bases = [device.base(index) for index in range(2)]
        assert bases == [receive.device_used_index, send.device_used_index]
        before = bytes(memory.view)
        exchange()
        asked = bytes(memory.view)
        time.sleep(SETTLE_S)
        assert bytes(memory.view) == asked != before
        assert [device.base(index) for index in range(2)] == bases


# --- memory ---


def test_a_batch_that_failed_leaves_a_device_that_can_be_mapped(block_node):
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
        device = stack.enter_context(raw(block_node))
        region = memory.region
        device.message(BATCH_BEGIN)
        device.map(memory)
        with refuses(EFAULT):
            device.map(memory)  # the same range again
        device.message(BATCH_END)
        device.message(INVALIDATE, region.guest_address, region.size_bytes)
        device.map(memory)


def test_what_was_unmapped_the_device_does_not_reach(disk):
    """It finds its ring no more: nothing is answered, and nothing is written."""
    disk.unmap()
    disk.requests(3)
    asked = bytes(disk.memory.view)
    disk.queue.kick()
    time.sleep(SETTLE_S)
    assert bytes(disk.memory.view) == asked


def counters():
    """(pages that are pinned, pages of shared memory) of the machine."""
    values = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(values["nr_foll_pin_acquired"]) - int(values["nr_foll_pin_released"]), int(values["nr_shmem"])


def locked_kib():
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPin:")
    )


@pytest.mark.parametrize("ending", ["unmap", "close"])
def test_memory_is_given_back(block_node, ending):
    """Pages are not pinned any more, are not counted as locked, and the file is let go of."""
    pages = 16 << 20 >> 12
    before = counters(), locked_kib()
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(16 << 20))
        memory.view[:: 1 << 12] = b"x" * pages
        device = stack.enter_context(raw(block_node))
        device.map(memory)
        assert locked_kib() - before[1] == (pages * 4 if PINS else 0)
        if ending == "unmap":
            device.message(INVALIDATE, memory.region.guest_address, memory.region.size_bytes)
            assert locked_kib() == before[1]
            memory.close()
            assert_settles(before[0], pages)
    assert_settles(before[0], pages)
    assert locked_kib() == before[1]


def assert_settles(before, pages):
    """Within less than half of the pages: other processes have some too."""
    deadline = time.monotonic() + 5
    while (now := counters()) and (now[0] > before[0] or now[1] > before[1] + pages // 2):
        assert time.monotonic() < deadline, f"pinned, shared: {before} before, {now} now"
        time.sleep(0.01)
