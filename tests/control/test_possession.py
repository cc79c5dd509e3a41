"""Whose the state is: a move leaves at most one device that can run, whoever dies at whatever point."""

import os
import re
import stat
import threading
from contextlib import contextmanager

import pytest

from vdpabridge.control.client import ControlClient, ControlError
from vdpabridge.control.moving import MoveFailed, move
from vdpabridge.control.possession import Possession
from vdpabridge.device import RunState
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..state.procedures.test_faults import files_of_at_most
from ..support.disk_lab import MEMORY_BYTES, VERSION_1, Lab
from ..support.waiting import wait_until
from .test_methods import serving


@contextmanager
def two(tmp_path):
    """(source, its guest's work, destination)."""
    (tmp_path / "b").mkdir()
    with serving(tmp_path) as source, serving(tmp_path / "b") as destination:
        yield source, source.at_work(), destination


def halfway(client, there, **options):
    """What a mover does before it says `moved`: the state is in both, and the source is held by its connection."""
    reader, writer = os.pipe()
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(there.ask("load", reader, moving=True, **options)))
    thread.start()
    client.ask("save", writer, stay="connection")
    os.close(writer)
    thread.join()
    os.close(reader)
    assert loaded


def started(served):
    """What a front-end gets that starts the device."""
    stack = served._stack
    front = served.front_end()
    memory = stack.enter_context(GuestMemory(MEMORY_BYTES))
    queue = stack.enter_context(SplitQueue(memory, 64))
    front.map([memory.region])
    front.accept_features(VERSION_1)
    queue.attach(front, 0)
    front.start()
    front.check_health()
    return served.device.state


def test_a_move(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        move(one, other)
        assert (one.ask("status")["moved"], other.ask("status")["arriving"]) == (True, False)
        assert started(destination) is RunState.RUNNING
        assert source.device.state is RunState.SUSPENDED


def test_a_destination_does_not_start_before_it_is_said_that_the_source_does_not(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        assert other.ask("status")["arriving"] is True
        assert started(destination) is not RunState.RUNNING
        for method, params in (("resume", {}), ("save", {"path": str(tmp_path / "image")}), ("moved", {})):
            with pytest.raises(ControlError, match="came from another device, which may run") as caught:
                other.ask(method, **params)
            assert "resume --force" in caught.value.hint
        assert one.ask("moved") == {"state": "suspended"}
        assert destination.device.state is not RunState.RUNNING
        assert other.ask("arrived") == {"state": "running"}
        assert (source.device.state, destination.device.state) == (RunState.SUSPENDED, RunState.RUNNING)


def test_a_mover_that_dies_between_load_and_moved(tmp_path):
    with two(tmp_path) as (source, work, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        one.close()
        other.close()
        work.finish()
        assert source.device.state is RunState.RUNNING
        assert started(destination) is not RunState.RUNNING
        assert destination.client().ask("resume", force=True) == {"state": "running"}


def test_a_mover_that_dies_before_arrived(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        one.ask("moved")
        one.close()
        other.close()
        assert started(destination) is not RunState.RUNNING
        status = destination.client().ask("status")
        assert (status["arriving"], status["moved"], status["held"]) == (True, False, True)
        assert source.device.state is RunState.SUSPENDED


def test_a_move_back_that_fails_leaves_its_destination_moved(tmp_path):
    """It was the source of the move before: its state is old, whatever happens to the new one."""
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        move(one, other)
        Lab(destination._stack, destination.front_end())
        source.device.faults.fail_check = True
        with pytest.raises(MoveFailed) as caught:
            move(other, one)
        assert f"{destination.control} is running; nothing was moved" in caught.value.hint
        status = one.ask("status")
        assert (status["moved"], status["arriving"]) == (True, False)


def test_a_load_that_nobody_moves_is_the_devices_own(tmp_path):
    with two(tmp_path) as (source, _, destination):
        source.client().ask("save", path=str(tmp_path / "image"))
        other = destination.client()
        other.ask("load", path=str(tmp_path / "image"))
        assert other.ask("status")["arriving"] is False
        with pytest.raises(ControlError, match="this client has brought no state"):
            other.ask("arrived")
        assert started(destination) is RunState.RUNNING


def test_a_second_mover_replaces_what_the_first_has_left(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        one.ask("release")
        move(one, other)
        assert other.ask("status")["arriving"] is False
        assert started(destination) is RunState.RUNNING


def test_a_load_that_fails_leaves_what_came_before(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        (tmp_path / "bad").write_bytes(b"no image")
        with pytest.raises(ControlError):
            other.ask("load", path=str(tmp_path / "bad"), moving=True)
        assert (other.ask("status")["arriving"], other.ask("status")["held"]) == (False, False)
        halfway(one, other)
        with pytest.raises(ControlError):
            other.ask("load", path=str(tmp_path / "bad"), moving=True)
        assert other.ask("status")["arriving"] is True


def test_only_who_has_brought_the_state_says_that_it_has_arrived(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other, third = source.client(), destination.client(), destination.client()
        halfway(one, other)
        one.ask("moved")
        with pytest.raises(ControlError, match="this client has brought no state"):
            third.ask("arrived")
        assert other.ask("status")["arriving"] is True
        other.ask("arrived")


@pytest.mark.parametrize("moving", [False, True])
def test_state_that_is_arriving_is_not_replaced_under_its_mover(tmp_path, moving):
    with two(tmp_path) as (source, _, destination):
        source.client().ask("save", path=str(tmp_path / "image"))
        one, third = source.client(), destination.client()
        with ControlClient(destination.control, timeout_s=10) as other:
            halfway(one, other)
            with pytest.raises(ControlError, match="another client is moving state into it"):
                third.ask("load", path=str(tmp_path / "image"), moving=moving)
            one.ask("release")
        wait_until(lambda: len(destination.server.also_served._clients) == 1)
        # whoever has left cannot say any more that it arrived
        third.ask("load", path=str(tmp_path / "image"), moving=moving)
        assert third.ask("status")["arriving"] is moving


def test_two_movers_at_once(tmp_path):
    """Neither is told that it has moved a state which then is not there."""
    (tmp_path / "third").mkdir()
    with two(tmp_path) as (source, _, destination), serving(tmp_path / "third") as third:
        third.at_work()
        ends = []

        def move_from(served):
            try:
                move(served.client(), destination.client())
                ends.append(served)
            except MoveFailed:
                ends.append(None)

        threads = [threading.Thread(target=move_from, args=[served]) for served in (source, third)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        moved = [served for served in (source, third) if served.client().ask("status")["moved"]]
        assert [served for served in ends if served] == moved
        assert len(moved) == 1
        assert [served.device.state for served in (source, third) if served not in moved] == [RunState.RUNNING]


def test_a_device_at_work_is_not_touched_by_a_move_that_it_refuses(tmp_path):
    with two(tmp_path) as (source, work, destination):
        other_work = destination.at_work()
        asked = []
        suspend = destination.device._suspend
        destination.device._suspend = lambda **words: (asked.append("suspend"), suspend(**words))
        with pytest.raises(MoveFailed, match="not while the device is running"):
            move(source.client(), destination.client())
        assert asked == []
        work.finish()
        other_work.finish()


def test_what_has_lost_the_state_has_not_got_it(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        front = destination.front_end()
        halfway(one, other)
        one.ask("moved")
        front.reset()
        with pytest.raises(ControlError, match="was reset after the state had come") as caught:
            other.ask("arrived")
        assert "still has it" in caught.value.hint
        assert other.ask("status")["held"] is True


# --- in a process that comes after ---


def test_a_process_that_comes_after_knows_it(tmp_path):
    marker = str(tmp_path / "c.moved")
    with serving(tmp_path, marker=marker) as those:
        those.at_work()
        client = those.client()
        assert client.ask("moved") == {"state": "suspended"}
        assert stat.S_IMODE(os.stat(marker).st_mode) == 0o600
    for path in ("s", "c"):
        (tmp_path / path).unlink(missing_ok=True)
    with serving(tmp_path, marker=marker) as those:
        client = those.client()
        assert (client.ask("status")["moved"], client.ask("status")["held"]) == (True, True)
        assert started(those) is not RunState.RUNNING
        with pytest.raises(ControlError, match="moved to another device"):
            client.ask("resume")
        assert client.ask("resume", force=True) == {"state": "running"}
        assert not os.path.exists(marker)


def test_state_that_comes_ends_it_for_the_process_after_too(tmp_path):
    (tmp_path / "b").mkdir()
    marker = str(tmp_path / "c.moved")
    with serving(tmp_path, marker=marker) as those, serving(tmp_path / "b") as others:
        others.at_work()
        there, here = others.client(), those.client()
        here.ask("moved")
        halfway(there, here)
        assert os.path.exists(marker), "the other one may run"
        there.ask("moved")
        here.ask("arrived")
        assert not os.path.exists(marker)


def test_what_cannot_be_remembered_is_not_moved(tmp_path):
    with serving(tmp_path, marker=str(tmp_path / "no folder" / "c.moved")) as those:
        work, client = those.at_work(), those.client()
        with pytest.raises(ControlError, match=r"No such file or directory.*the device is running now"):
            client.ask("moved")
        assert client.ask("status")["moved"] is False
        work.finish()


def test_a_disk_that_is_full_leaves_no_half_of_a_marker(tmp_path):
    marker = tmp_path / "c.moved"
    with serving(tmp_path, marker=str(marker)) as those:
        work, client = those.at_work(), those.client()
        with files_of_at_most(10), pytest.raises(ControlError, match="File too large"):
            client.ask("moved")
        assert not marker.exists()
        work.finish()


@pytest.mark.parametrize("what", ["a FIFO", "a folder"])
def test_what_cannot_be_a_marker_is_refused_at_once(tmp_path, what):
    marker = tmp_path / "c.moved"
    with serving(tmp_path, marker=str(marker)) as those:
        work, client = those.at_work(), those.client()
        os.mkfifo(marker) if what == "a FIFO" else marker.mkdir()
        with pytest.raises(ControlError, match=re.escape(str(marker))):
            client.ask("moved")
        client.ask("suspend")
        assert client.ask("resume") == {"state": "running"}
        work.finish()


def test_a_marker_that_is_a_link_to_nothing_counts(tmp_path):
    (tmp_path / "c.moved").symlink_to(tmp_path / "nothing")
    with serving(tmp_path, marker=str(tmp_path / "c.moved")) as those:
        assert those.client().ask("status")["moved"] is True


def test_a_marker_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    with serving(tmp_path, marker=str(tmp_path / "c.moved")) as those:
        (tmp_path / "c.moved").symlink_to(tmp_path / "victim")
        client = those.client()
        with pytest.raises(ControlError, match="symbolic links"):
            client.ask("moved")
    assert (tmp_path / "victim").read_text() == "precious"


class NotSuspended:
    """A server that cannot hold its device."""

    def hold(self, _holder):
        raise OSError(5, "Input/output error")

    def holds(self, _holder):
        return False


def test_a_device_that_cannot_be_held_was_not_moved(tmp_path):
    marker = tmp_path / "marker"
    possession = Possession(NotSuspended(), str(marker))
    with pytest.raises(OSError, match="Input/output"):
        possession.give_away()
    assert not marker.exists()
