"""One deadline for a whole operation."""

import threading
import time

import pytest

from vdpabridge.linux.deadline import Deadline, StillRunning, TimeLimit, call_within


def test_an_operation_has_one_deadline_however_often_it_waits():
    limit = TimeLimit(5)
    assert limit.begin()
    first = limit.deadline()
    assert not limit.begin(), "a part of the operation that lasts"
    assert limit.deadline() is first
    limit.end()
    assert limit.deadline() is not first


def test_without_an_operation_each_wait_has_its_own():
    limit = TimeLimit(5)
    assert limit.deadline() is not limit.deadline()
    assert TimeLimit().left_s() is None


@pytest.mark.parametrize(("own_s", "bound_s", "expected_s"), [(5, 1, 1), (1, 5, 1), (None, 1, 1), (1, None, 1)])
def test_the_sooner_of_two_deadlines_counts(own_s, bound_s, expected_s):
    limit = TimeLimit(own_s)
    with limit.within(Deadline(bound_s)):
        assert expected_s - 0.5 < limit.left_s() <= expected_s
    assert limit.left_s() is None or limit.left_s() > own_s - 0.5


def test_bounds_within_bounds():
    limit = TimeLimit()
    with limit.within(Deadline(1)), limit.within(Deadline(100)):
        assert limit.left_s() <= 1
    with limit.within(Deadline(0)):
        assert limit.passed
    assert not limit.passed


def test_a_shorter_timeout_holds_for_what_lasts_already():
    """As when a process is told to end."""
    limit = TimeLimit(100)
    limit.begin()
    limit.timeout_s = 1
    assert limit.left_s() <= 1
    limit.timeout_s = 100
    assert limit.left_s() <= 1, "it is never prolonged"
    limit.end()
    assert limit.left_s() > 50


def test_what_a_call_brings_too_late_is_discarded():
    came = []
    go_on = threading.Event()
    with pytest.raises(StillRunning):
        call_within(0.01, lambda: go_on.wait(5) and 9, came.append)
    go_on.set()
    end_s = time.monotonic() + 5
    while not came and time.monotonic() < end_s:
        time.sleep(0.001)
    assert came == [9]


def test_what_a_call_brought_is_discarded_where_the_wait_is_interrupted(monkeypatch):
    """The result is there, and Ctrl-C comes before the caller has it."""
    came = []

    def interrupted(thread, _timeout_s=None):
        real(thread, 5)
        raise KeyboardInterrupt

    real = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call_within(5, lambda: 7, came.append)
    assert came == [7]
