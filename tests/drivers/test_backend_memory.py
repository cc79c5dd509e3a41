"""The guest's memory in a back-end: whatever interrupts, the books and the back-end come together again."""

from contextlib import contextmanager

import pytest

from vdpabridge.device import MemoryRegion, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import DeadlineExceeded, PeerRefused

from ..support.pair import bridged
from ..support.transitions import shared_file
from ..support.waiting import wait_until

SIZE_BYTES = 1 << 20
PLACES = (0x1000_0000, 0x2000_0000)


class Unwilling(Sim):
    """Refuses to unmap as often as ``refusals`` says, from the number ``after`` on."""

    refusals = 0
    after = 0

    def _unmap(self, regions):
        if self.after:
            self.after -= 1
        elif self.refusals:
            self.refusals -= 1
            raise ValueError("not now")
        super()._unmap(regions)


@contextmanager
def bench(*, slots=True):
    """(our device, the back-end's, two regions)."""
    with (
        shared_file(SIZE_BYTES) as first,
        shared_file(SIZE_BYTES) as second,
        Unwilling.blk(1 << 20, timeout_s=5) as inner,
        bridged(inner) as device,
    ):
        if not slots:
            device._memory._slots = 0
        yield (
            device,
            inner,
            [MemoryRegion(place, SIZE_BYTES, fd) for place, fd in zip(PLACES, (first, second), strict=True)],
        )


def places(device):
    return sorted(region.guest_address for region in device.regions)


@contextmanager
def interrupted_at_reply(device, *numbers):
    """Ctrl-C while those replies are waited for."""
    connection = device._requests.connection
    receive, count = connection.receive, [0]

    def receive_or_not(*words, **options):
        count[0] += 1
        if count[0] == max(numbers):
            connection.receive = receive
        if count[0] in numbers:
            raise KeyboardInterrupt
        return receive(*words, **options)

    connection.receive = receive_or_not
    with pytest.raises(KeyboardInterrupt):
        yield


@pytest.mark.parametrize(("slots", "number"), [(True, 1), (True, 2), (False, 1)], ids=["slot 1", "slot 2", "table"])
def test_a_map_that_is_interrupted_maps_nothing(slots, number):
    with bench(slots=slots) as (device, inner, regions):
        with interrupted_at_reply(device, number):
            device.map(regions)
        assert device.regions == []
        device.map(regions)
        assert places(device) == places(inner) == list(PLACES)
        device.unmap(regions[:1])
        assert places(device) == places(inner) == [PLACES[1]]


@pytest.mark.parametrize("slots", [True, False], ids=["slots", "table"])
def test_memory_that_was_taken_away_while_something_interrupted_is_gone(slots):
    with bench(slots=slots) as (device, inner, regions):
        device.map(regions)
        with interrupted_at_reply(device, 1):
            device.unmap(regions[:1])
        assert places(device) == [PLACES[1]]
        device.map([regions[0]])
        device.unmap([regions[0]])
        assert places(device) == places(inner) == [PLACES[1]]


def test_an_interrupted_unmap_of_two_leaves_what_was_not_asked_for_yet():
    with bench() as (device, inner, regions):
        device.map(regions)
        with interrupted_at_reply(device, 1):
            device.unmap(regions)
        assert places(device) == [PLACES[1]]
        device.unmap(device.regions)
        assert places(inner) == []


def test_an_unmap_that_is_refused_half_way_says_what_is_left():
    with bench() as (device, inner, regions):
        device.map(regions)
        inner.refusals, inner.after = 1, 1
        with pytest.raises(PeerRefused):
            device.unmap(regions)
        assert places(device) == places(inner) == [PLACES[1]]
        device.unmap(device.regions)
        assert places(device) == places(inner) == []


def test_a_map_that_is_refused_half_way_takes_away_what_it_can():
    """Although one of them is not given back at once."""
    with bench() as (device, inner, regions):
        beyond = MemoryRegion(0x4000_0000, 2 * SIZE_BYTES, regions[0].fd)
        inner.refusals = 1
        with pytest.raises(PeerRefused):
            device.map([*regions, beyond])
        assert device.regions == []
        # the refusal was taken for "it is not there"
        assert len(inner.regions) <= 1
        assert device.state is RunState.RESET


def test_memory_in_doubt_is_settled_before_a_start():
    with bench() as (device, inner, regions):
        device.map(regions[:1])
        device.accept_features(1 << 32)
        # also while it is taken away again
        with interrupted_at_reply(device, 1, 2):
            device.map(regions[1:])
        wait_until(lambda: places(inner) == list(PLACES))
        device.start()
        assert places(inner) == [PLACES[0]]


def test_what_could_not_be_mapped_takes_no_slot():
    with bench() as (device, inner, regions):
        device._memory._slots = 2
        beyond = MemoryRegion(0x4000_0000, 2 * SIZE_BYTES, regions[0].fd)
        for _ in range(3):
            with pytest.raises(PeerRefused):
                device.map([regions[0], beyond])
        device.map(regions)
        assert places(device) == places(inner) == list(PLACES)
        with pytest.raises(ValueError, match="takes 2 memory regions"):
            device.map([MemoryRegion(0x5000_0000, 4096, regions[0].fd)])


def test_a_table_that_is_refused_leaves_the_one_before():
    with bench(slots=False) as (device, inner, regions):
        device.map(regions)
        inner.refusals = 1
        with pytest.raises(PeerRefused):
            device.unmap(regions[:1])
        assert places(device) == places(inner) == list(PLACES)
        since = len(device._requests._asked)
        device.accept_features(1 << 32)
        device.start()
        assert len(device._requests._asked) == since
        device.suspend()
        device.unmap(regions[:1])
        assert places(device) == places(inner) == [PLACES[1]]


def test_what_is_in_doubt_is_gone_before_anything_else_goes():
    with bench() as (device, inner, regions):
        device.map(regions[:1])
        with interrupted_at_reply(device, 1, 2):
            device.map(regions[1:])
        wait_until(lambda: places(inner) == list(PLACES))
        device.unmap(regions[:1])
        assert places(inner) == []


def test_a_map_that_is_refused_and_cannot_be_taken_back_says_why_it_was_refused():
    """Not what came up while it was taken back."""
    with bench() as (device, _, regions):
        beyond = MemoryRegion(0x4000_0000, 2 * SIZE_BYTES, regions[0].fd)
        connection = device._requests.connection
        receive = connection.receive
        count = [0]

        def late(*words, **options):
            count[0] += 1
            if count[0] == 3:
                raise DeadlineExceeded("receive", 1)
            return receive(*words, **options)

        connection.receive = late
        with pytest.raises(PeerRefused):
            device.map([regions[0], beyond])
