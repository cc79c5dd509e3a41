"""Whose the state is: a move leaves at most one device that can run, whoever dies at whatever point."""

import os
import stat
import threading
from contextlib import contextmanager

import pytest

from vdpabridge.control.client import ControlError
from vdpabridge.control.moving import MoveFailed, move
from vdpabridge.control.possession import Possession
from vdpabridge.device import RunState
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..support.disk_lab import MEMORY_BYTES, VERSION_1, Lab
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
        with pytest.raises(ControlError, match="no state was on its way"):
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
        there = others.client()
        those.client().ask("moved")
        halfway(there, those.client())
        assert os.path.exists(marker), "the other one may run"
        there.ask("moved")
        those.client().ask("arrived")
        assert not os.path.exists(marker)


def test_what_cannot_be_remembered_is_not_moved(tmp_path):
    with serving(tmp_path, marker=str(tmp_path / "no folder" / "c.moved")) as those:
        work, client = those.at_work(), those.client()
        with pytest.raises(ControlError, match=r"No such file or directory.*the device is running now"):
            client.ask("moved")
        assert client.ask("status")["moved"] is False
        work.finish()


def test_a_marker_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "c.moved").symlink_to(tmp_path / "victim")
    (tmp_path / "c.moved").unlink()
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
