"""Whose the state is: a move leaves at most one device that can run, whoever dies at whatever point."""

import os
import re
import stat
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from errno import EROFS

import pytest

from vdpabridge.abi.virtio_ring import VIRTIO_RING_F_INDIRECT_DESC
from vdpabridge.control import markers
from vdpabridge.control.client import ControlClient, ControlError
from vdpabridge.control.moving import MoveFailed, move
from vdpabridge.control.possession import Possession
from vdpabridge.control.requests import Method
from vdpabridge.device import Capability, RunState, StateDirection
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import DeadlineExceeded, VdpaBridgeError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..state.procedures.test_faults import files_of_at_most
from ..support.disk_lab import DISK_BYTES, MEMORY_BYTES, VERSION_1, Lab
from ..support.pair import served
from ..support.state import load, state_of
from ..support.transitions import begin_state
from ..support.waiting import wait_until
from .test_methods import serving, serving_back_end


@contextmanager
def two(tmp_path):
    """(source, its guest's work, destination)."""
    (tmp_path / "b").mkdir()
    with serving(tmp_path) as source, serving(tmp_path / "b") as destination:
        yield source, source.at_work(), destination


def halfway(client, there, move="m", **options):
    """What a mover does before it says `moved`: the state is in both, and the source is held by its connection."""
    reader, writer = os.pipe()
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(there.ask("load", reader, move=move, **options)))
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
        for method, params in (("resume", {}), ("save", {"path": str(tmp_path / "image")}), ("moved", {"move": "n"})):
            with pytest.raises(ControlError, match="came from another device, which may run") as caught:
                other.ask(method, **params)
            assert "resume --move m" in caught.value.hint
        assert one.ask("moved", move="m") == {"state": "suspended"}
        assert destination.device.state is not RunState.RUNNING
        assert other.ask("arrived", move="m") == {"state": "running"}
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
        one.ask("moved", move="m")
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
            other.ask("arrived", move="m")
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
            other.ask("load", path=str(tmp_path / "bad"), move="m")
        assert (other.ask("status")["arriving"], other.ask("status")["held"]) == (False, False)
        halfway(one, other)
        with pytest.raises(ControlError):
            other.ask("load", path=str(tmp_path / "bad"), move="n")
        assert other.ask("status")["moves"] == [{"move": "m", "fate": "came"}]
        assert other.ask("status")["arriving"] is True


def test_only_who_has_brought_the_state_says_that_it_has_arrived(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other, third = source.client(), destination.client(), destination.client()
        halfway(one, other)
        one.ask("moved", move="m")
        with pytest.raises(ControlError, match="this client has brought no state"):
            third.ask("arrived", move="m")
        with pytest.raises(ControlError, match="this client has brought no state by move n"):
            other.ask("arrived", move="n")
        assert other.ask("status")["arriving"] is True
        other.ask("arrived", move="m")


@pytest.mark.parametrize("options", [{}, {"move": "n"}], ids=["a load", "a move"])
def test_state_that_is_arriving_is_not_replaced_under_its_mover(tmp_path, options):
    with two(tmp_path) as (source, _, destination):
        source.client().ask("save", path=str(tmp_path / "image"))
        one, third = source.client(), destination.client()
        with ControlClient(destination.control, timeout_s=10) as other:
            halfway(one, other)
            with pytest.raises(ControlError, match="another client is moving state into it"):
                third.ask("load", path=str(tmp_path / "image"), **options)
            one.ask("release")
        wait_until(lambda: len(destination.server.also_served._clients) == 1)
        # whoever has left cannot say any more that it arrived
        third.ask("load", path=str(tmp_path / "image"), **options)
        assert third.ask("status")["arriving"] is (options != {})


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


def test_a_second_mover_comes_too_late(tmp_path):
    """What has arrived, and was not started yet, is nowhere else."""
    (tmp_path / "third").mkdir()
    with two(tmp_path) as (source, _, destination), serving(tmp_path / "third") as third:
        work = third.at_work()
        move(source.client(), destination.client())
        with pytest.raises(MoveFailed, match="has arrived in it, and no front-end has started it"):
            move(third.client(), destination.client())
        work.finish()
        third.client().ask("save", path=str(tmp_path / "image"))
        destination.client().ask("load", path=str(tmp_path / "image"))
        assert destination.client().ask("status")["arrived"] is False


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


@pytest.mark.parametrize("how", ["a reset", "another load"])
def test_what_has_lost_the_state_has_not_got_it(tmp_path, how):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        front = destination.front_end()
        one.ask("save", path=str(tmp_path / "image"))
        halfway(one, other)
        assert other.ask("status")["lost"] is False
        one.ask("moved", move="m")
        if how == "a reset":
            front.reset()
        else:
            # a VMM that expects a migration of its own
            load(front, state_of(front))
        with pytest.raises(ControlError, match="it has lost it"):
            other.ask("arrived", move="m")
        status = other.ask("status")
        assert (status["held"], status["arriving"], status["lost"], status["arrived"]) == (True, True, True, False)
        with pytest.raises(ControlError, match="does not have it") as caught:
            other.ask("resume")
        assert "begin without that state" in caught.value.hint
        assert "if the other device does not run and never will" in caught.value.hint


def test_what_was_moved_and_then_reset_is_not_there_any_more(tmp_path):
    with serving(tmp_path) as those:
        those.at_work()
        client = those.client()
        client.ask("moved", move="m")
        assert client.ask("status")["lost"] is False
        those.device.reset()
        status = client.ask("status")
        assert (status["moved"], status["lost"]) == (True, True)


def test_nobody_has_lost_what_is_still_under_way(tmp_path):
    with serving(tmp_path) as destination:
        reader, writer = os.pipe()
        other = destination.client()
        with open(writer, "wb"):
            thread = threading.Thread(target=lambda: loads.append(ask_in_vain(other, reader)))
            loads = []
            thread.start()
            status = destination.client()
            wait_until(lambda: status.ask("status")["arriving"])
            assert status.ask("status")["lost"] is False
        thread.join()
        os.close(reader)
        assert loads == [True]
        assert (status.ask("status")["arriving"], status.ask("status")["held"]) == (False, False)


def ask_in_vain(client, reader):
    try:
        client.ask("load", reader, move="m")
    except ControlError:
        return True
    return False


def test_arrived_can_be_said_again(tmp_path):
    """Whoever has had no answer asks `status`, or says it again."""
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        one.ask("moved", move="m")
        assert other.ask("status")["arrived"] is False
        other.ask("arrived", move="m")
        status = other.ask("status")
        assert (status["arrived"], status["arriving"], status["lost"]) == (True, False, False)
        destination.client().ask("arrived", move="m")
        assert started(destination) is RunState.RUNNING
        assert other.ask("status")["arrived"] is True
        destination.device.reset()
        assert other.ask("status")["arrived"] is False


def test_what_was_forced_has_arrived(tmp_path):
    """Another administrator was faster than the mover, who is not to go back to the source."""
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        one.ask("moved", move="m")
        destination.client().ask("resume", force=True)
        assert other.ask("status")["arrived"] is True
        assert other.ask("arrived", move="m")


class Deaf(ControlClient):
    """Asks, and does not hear the answer to ``unheard``."""

    unheard = ""

    def ask(self, method, fd=None, **params):
        answer = super().ask(method, fd, **params)
        if method == self.unheard:
            raise DeadlineExceeded(method, 5)
        return answer


@pytest.mark.parametrize("unheard", ["moved", "arrived"])
def test_advice_after_an_answer_that_did_not_come(tmp_path, unheard):
    """It never says that the source may run because nothing is known of the destination."""
    with two(tmp_path) as (source, _, destination):
        with Deaf(source.control, timeout_s=10) as one, Deaf(destination.control, timeout_s=10) as other:
            one.unheard = other.unheard = unheard
            with pytest.raises(MoveFailed) as caught:
                move(one, other)
        hint = caught.value.hint
        if unheard == "moved":
            assert f"resume --force {source.control}" not in hint
            assert source.client().ask("status")["moved"] is True
            assert destination.client().ask("status")["arriving"] is True
        else:
            before, _, after = hint.partition(f"end the process of {destination.control} for good before")
            assert f"resume --force {source.control}" in after
            assert f"resume --force {source.control}" not in before
            assert f"a guest may have worked with it since, {source.control} must not run" in before
            assert destination.client().ask("status")["arrived"] is True
        (name,) = re.findall(f"resume --move ([0-9a-f]+) {destination.control}", hint)
        destination.client().ask("resume", move=name)
        assert started(destination) is RunState.RUNNING
        assert destination.client().ask("status")["moves"] == [{"move": name, "fate": "arrived"}]
        assert source.client().ask("status")["moves"] == [{"move": name, "fate": "moved"}]
        assert source.device.state is RunState.SUSPENDED


class Dying(ControlClient):
    """Its process answers nothing any more when it has saved; not even that."""

    dead = False

    def ask(self, method, fd=None, **params):
        if self.dead:
            raise VdpaBridgeError(method, why="the connection is closed")
        answer = super().ask(method, fd, **params)
        if method == "save":
            self.dead = True
            raise VdpaBridgeError(method, why="the connection is closed")
        return answer


def test_advice_if_the_source_ends_when_the_destination_has_its_state(tmp_path):
    """Nobody else has it: to end that process is not the first thing to do."""
    with two(tmp_path) as (source, _, destination):
        other = destination.client()
        with Dying(source.control, timeout_s=10) as one, pytest.raises(MoveFailed) as caught:
            move(one, other)
        other.leave()
        before, _, after = caught.value.hint.partition(f"If the process of {source.control} has ended")
        assert f"end the process of {destination.control}" in before
        assert "If its process still runs" in before
        assert f"end the process of {destination.control}" not in after
        (name,) = re.findall(f"resume --move ([0-9a-f]+) {destination.control}", after)
        destination.client().ask("resume", move=name)
        assert started(destination) is RunState.RUNNING
        # what the test does not do: the process has not ended
        source.device.reset()


def test_a_source_that_refuses_has_moved_nothing(tmp_path):
    with two(tmp_path) as (source, work, destination):
        one, other = source.client(), destination.client()
        one.ask = refusing(one.ask, "moved")
        with pytest.raises(MoveFailed) as caught:
            move(one, other)
        assert f"{source.control} is running; nothing was moved" in caught.value.hint
        assert f"{destination.control} has the state, and does not start" in caught.value.hint
        work.finish()


def refusing(ask, what):
    def asked(method, fd=None, **params):
        if method == what:
            raise ControlError(method, "c", {"code": -32000, "message": "No space left on device"})
        return ask(method, fd, **params)

    return asked


def test_a_load_that_was_dropped_has_replaced_nothing(tmp_path):
    """And a check without a load changes nothing either, whoever asks for it."""
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        front = destination.front_end()
        with begin_state(front, StateDirection.LOAD) as file:
            file.write(b"half")
        front.close()
        with suppress(VdpaBridgeError):
            destination.front_end().check_state()
        assert other.ask("status")["lost"] is False
        one.ask("moved", move="m")
        other.ask("arrived", move="m")


def test_what_a_back_end_may_have_taken_has_replaced_it(tmp_path):
    """No message of vhost-user drops a load: a back-end that has got all of it keeps it."""
    with Sim.blk(DISK_BYTES, timeout_s=5) as sim, served(sim) as ours, ExitStack() as stack:
        (tmp_path / "b").mkdir()
        source = stack.enter_context(serving(tmp_path))
        source.at_work()
        behind = serving_back_end(stack, tmp_path / "b", ours, timeout_s=5, config_size_bytes=96)
        one, other = source.client(), behind.client()
        halfway(one, other)
        assert other.ask("status")["lost"] is False
        front = behind.front_end()
        with begin_state(front, StateDirection.LOAD) as file:
            file.write(b"another state")
        front.close()
        wait_until(lambda: other.ask("status")["lost"])
        one.ask("moved", move="m")
        with pytest.raises(ControlError, match="it has lost it"):
            other.ask("arrived", move="m")


def test_other_features_lose_nothing_of_a_device_without_state(tmp_path):
    class Stateless(Sim):
        @property
        def capabilities(self):
            return super().capabilities - {Capability.DEVICE_STATE}

    (tmp_path / "b").mkdir()
    with serving(tmp_path, Stateless) as source, serving(tmp_path / "b", Stateless) as destination:
        source.at_work()
        one, other = source.client(), destination.client()
        halfway(one, other)
        for features in (VERSION_1, VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC):
            with destination.front_end() as front:
                front.accept_features(features)
        assert other.ask("status")["lost"] is False
        one.ask("moved", move="m")
        other.ask("arrived", move="m")


def test_what_cannot_be_forgotten_has_not_arrived(tmp_path, monkeypatch):
    """The file would hold the process that comes after."""
    (tmp_path / "b").mkdir()
    with serving(tmp_path) as source, serving(tmp_path / "b", remembers_at=str(tmp_path / "b/c")) as destination:
        source.at_work()
        one, other = source.client(), destination.client()
        halfway(one, other)
        one.ask("moved", move="m")
        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", lambda path: (_ for _ in ()).throw(OSError(EROFS, "Read-only", path)))
            with pytest.raises(ControlError, match="Read-only file system"):
                other.ask("arrived", move="m")
        status = other.ask("status")
        assert (status["arriving"], status["arrived"], status["held"]) == (True, False, True)
        with pytest.raises(ControlError, match="this client has brought no state"):
            destination.client().ask("arrived", move="m")
        other.ask("arrived", move="m")
        assert other.ask("status")["arrived"] is True


@pytest.mark.parametrize("what", ["moved", "arrived"])
def test_nothing_is_said_for_a_mover_that_has_left(tmp_path, what):
    """He takes it for not done, and may go back to the source."""
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        asked, served = (one, source) if what == "moved" else (other, destination)
        if what == "arrived":
            one.ask("moved", move="m")
        control = served.server.also_served
        busy, go_on = threading.Event(), threading.Event()
        control.methods |= {"wait": Method(lambda _request: busy.set() or go_on.wait(10), at_once=True)}
        waiting = served.client()
        waiting._lines.send({"jsonrpc": "2.0", "id": 1, "method": "wait", "params": {}}, ())
        busy.wait(10)
        # both are there when the server looks again: what he asked for, and that he has left; and the device's thread is
        # faster than the one that looks
        put = control._errands.put
        control._errands.put = lambda errand: (put(errand), time.sleep(0.2))
        asked._lines.send({"jsonrpc": "2.0", "id": 9, "method": what, "params": {"move": "m"}}, ())
        asked.close()
        go_on.set()
        status = destination.client().ask("status")
        assert (status["arriving"], status["arrived"]) == (True, False)
        assert source.client().ask("status")["moved"] is (what == "arrived")


# --- each move has a name ---


def fates(client):
    return {each["move"]: each["fate"] for each in client.ask("status")["moves"]}


def test_what_became_of_a_move(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        assert (fates(one), fates(other)) == ({}, {"m": "came"})
        one.ask("moved", move="m")
        other.ask("arrived", move="m")
        assert (fates(one), fates(other)) == ({"m": "moved"}, {"m": "arrived"})
        destination.device.reset()
        assert fates(other) == {"m": "arrived"}, "what the device does with it is its own affair"
        other.ask("moved", move="n")
        assert fates(other) == {"m": "arrived", "n": "moved"}
        other.ask("resume", force=True)
        assert fates(other) == {"m": "arrived", "n": "taken back"}


@pytest.mark.parametrize("how", ["by force", "by another load"])
def test_a_device_that_begins_without_the_state_of_a_move(tmp_path, how):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        one.ask("save", path=str(tmp_path / "image"))
        halfway(one, other)
        destination.device.reset()
        assert fates(other) == {"m": "lost"}
        if how == "by force":
            other.ask("resume", force=True)
        else:
            other.ask("load", path=str(tmp_path / "image"))
        assert fates(other) == {"m": "given up"}
        assert other.ask("status")["held"] is False


def test_a_move_whose_mover_has_left_is_ended_by_its_name(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        one.ask("moved", move="m")
        with pytest.raises(ControlError, match="the client that moves the state of m is still connected"):
            destination.client().ask("resume", move="m")
        other.close()
        assert started(destination) is not RunState.RUNNING
        assert destination.client().ask("resume", move="m") == {"state": "running"}
        assert fates(destination.client()) == {"m": "arrived"}


def test_a_name_does_not_start_the_state_of_another_move(tmp_path):
    """Two moved into the same destination, and both have had no answer: each has the same advice."""
    (tmp_path / "third").mkdir()
    with two(tmp_path) as (source, _, destination), serving(tmp_path / "third") as third:
        third.at_work()
        for served, name in ((source, "first"), (third, "second")):
            one = served.client()
            with ControlClient(destination.control, timeout_s=10) as other:
                halfway(one, other, name)
            one.ask("moved", move=name)
        client = destination.client()
        wait_until(lambda: len(destination.server.also_served._clients) == 1)
        assert fates(client) == {"first": "lost", "second": "came"}
        with pytest.raises(ControlError, match="the state of move first came, and is lost") as caught:
            client.ask("resume", move="first")
        assert "'vdpabridge resume --force' of the device that it came from" in caught.value.hint
        assert client.ask("status")["held"] is True
        client.ask("resume", move="second")
        assert fates(client) == {"first": "lost", "second": "arrived"}


REFUSED = [
    ("unknown", "it knows nothing of move unknown", "if a guest may have worked with this device since"),
    ("gone", "the device was started without the state of move gone", "must not run as long as this one may"),
    ("back", "move back has taken its state away, and that was taken back", "leave --move away"),
    ("away", "move away has taken the state of this device away", "if the other device does not run and never will"),
]


def test_a_device_that_does_not_have_the_state_of_a_move_says_what_became_of_it(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other, "gone")
        destination.device.reset()
        other.ask("resume", force=True)
        other.ask("moved", move="back")
        other.ask("resume", force=True)
        other.ask("moved", move="away")
        for name, why, hint in REFUSED:
            with pytest.raises(ControlError, match=why) as caught:
                other.ask("resume", move=name)
            assert hint in caught.value.hint
        assert fates(other) == {"gone": "given up", "back": "taken back", "away": "moved"}


def test_a_move_that_was_moved_on_is_done_and_not_here(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        halfway(one, other)
        one.ask("moved", move="m")
        other.ask("arrived", move="m")
        other.ask("moved", move="n")
        destination.client().ask("arrived", move="m")
        assert other.ask("status")["held"] is True
        with pytest.raises(ControlError, match="its state was moved to another device"):
            other.ask("resume", move="m")


def test_a_name_is_used_once(tmp_path):
    with two(tmp_path) as (source, _, destination):
        one, other = source.client(), destination.client()
        one.ask("save", path=str(tmp_path / "image"))
        other.ask("load", path=str(tmp_path / "image"), move="m")
        with pytest.raises(ControlError, match="it knows move m already"):
            other.ask("load", path=str(tmp_path / "image"), move="m")
        other.ask("arrived", move="m")
        with pytest.raises(ControlError, match="it knows move m already"):
            other.ask("moved", move="m")
        assert fates(other) == {"m": "arrived"}


@pytest.mark.parametrize("name", ["", "a b", "a\n", "é", "x" * 65, 7, True, ["m"]])
def test_what_is_not_the_name_of_a_move(tmp_path, name):
    with serving(tmp_path) as those:
        client = those.client()
        for method in ("load", "moved", "arrived", "resume"):
            with pytest.raises(ControlError, match="is not a name of up to 64"):
                client.ask(method, move=name)
        assert fates(client) == {}


@pytest.mark.parametrize("method", ["moved", "arrived"])
def test_a_move_without_a_name(tmp_path, method):
    with serving(tmp_path) as those, pytest.raises(ControlError, match="move is missing"):
        those.client().ask(method)


def test_old_moves_are_forgotten(tmp_path):
    with serving(tmp_path) as those:
        client = those.client()
        for number in range(20):
            client.ask("moved", move=f"m{number}")
            client.ask("resume", force=True)
        assert list(fates(client)) == [f"m{number}" for number in range(4, 20)]


# --- in a process that comes after ---


def test_a_process_that_comes_after_knows_it(tmp_path):
    marker = str(tmp_path / "c.moved")
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        those.at_work()
        client = those.client()
        assert client.ask("moved", move="m") == {"state": "suspended"}
        assert stat.S_IMODE(os.stat(marker).st_mode) == 0o600
    for path in ("s", "c"):
        (tmp_path / path).unlink(missing_ok=True)
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        client = those.client()
        assert (client.ask("status")["moved"], client.ask("status")["held"]) == (True, True)
        assert fates(client) == {"m": "moved"}
        assert started(those) is not RunState.RUNNING
        with pytest.raises(ControlError, match="moved to another device"):
            client.ask("resume")
        assert client.ask("resume", force=True) == {"state": "running"}
        assert not os.path.exists(marker)


def test_a_destination_that_dies_before_its_state_has_arrived(tmp_path):
    """The source may run: the process that comes after does not."""
    (tmp_path / "b").mkdir()
    with serving(tmp_path) as source:
        work, one = source.at_work(), source.client()
        with serving(tmp_path / "b", remembers_at=str(tmp_path / "b/c")) as destination:
            halfway(one, destination.client())
        one.ask("release")
        work.finish()
        assert sorted(path.name for path in (tmp_path / "b").iterdir() if path.suffix) == ["c.arriving"]
        for path in ("s", "c"):
            (tmp_path / "b" / path).unlink(missing_ok=True)
        with serving(tmp_path / "b", remembers_at=str(tmp_path / "b/c")) as destination:
            other = destination.client()
            status = other.ask("status")
            assert (status["arriving"], status["lost"], status["held"]) == (True, True, True)
            assert fates(other) == {"m": "lost"}
            with pytest.raises(ControlError, match="the state of move m came, and is lost"):
                other.ask("resume", move="m")
            assert started(destination) is not RunState.RUNNING
            assert source.device.state is RunState.RUNNING
            other.ask("resume", force=True)
            assert destination.device.state is RunState.RUNNING
            assert not (tmp_path / "b/c.arriving").exists()


def test_what_has_not_come_is_not_remembered(tmp_path):
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        (tmp_path / "bad").write_bytes(b"no image")
        with pytest.raises(ControlError):
            those.client().ask("load", path=str(tmp_path / "bad"), move="m")
        assert not (tmp_path / "c.arriving").exists()


def test_state_that_comes_ends_it_for_the_process_after_too(tmp_path):
    (tmp_path / "b").mkdir()
    marker = str(tmp_path / "c.moved")
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those, serving(tmp_path / "b") as others:
        others.at_work()
        there, here = others.client(), those.client()
        here.ask("moved", move="m")
        halfway(there, here, "n")
        assert os.path.exists(marker), "the other one may run"
        there.ask("moved", move="n")
        here.ask("arrived", move="n")
        assert not os.path.exists(marker)


def test_what_cannot_be_remembered_is_not_moved(tmp_path):
    with serving(tmp_path, remembers_at=str(tmp_path / "no folder" / "c")) as those:
        work, client = those.at_work(), those.client()
        with pytest.raises(ControlError, match=r"No such file or directory.*the device is running now"):
            client.ask("moved", move="m")
        assert client.ask("status")["moved"] is False
        work.finish()


def test_a_disk_that_is_full_leaves_no_half_of_a_marker(tmp_path):
    """No guest is at work: the limit would be its disk's, too."""
    marker = tmp_path / "c.moved"
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        client = those.client()
        with files_of_at_most(10), pytest.raises(ControlError, match="moved: write: File too large"):
            client.ask("moved", move="m")
        assert not marker.exists()


def test_a_marker_that_cannot_be_replaced_stays_as_it_was(tmp_path):
    """Its moves are known to the process that comes after."""
    path = str(tmp_path / "c.moved")
    markers.write(path, "The device's state was moved.", ["m1"])
    with files_of_at_most(10), pytest.raises(VdpaBridgeError, match="File too large"):
        markers.write(path, "The device's state was moved.", ["m1", "m2"])
    assert markers.moves_in(path) == ["m1"]
    assert markers.write(path, "The device's state was moved.", ["m1", "m2"]) is False
    assert markers.moves_in(path) == ["m1", "m2"]
    assert os.listdir(tmp_path) == ["c.moved"]


@pytest.mark.parametrize("what", ["a FIFO", "a folder"])
def test_what_cannot_be_a_marker_is_refused_at_once(tmp_path, what):
    marker = tmp_path / "c.moved"
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        work, client = those.at_work(), those.client()
        os.mkfifo(marker) if what == "a FIFO" else marker.mkdir()
        with pytest.raises(ControlError, match=re.escape(str(marker))):
            client.ask("moved", move="m")
        client.ask("suspend")
        assert client.ask("resume") == {"state": "running"}
        work.finish()


def test_a_second_move_does_not_make_a_new_process_forget_the_first(tmp_path):
    """The second has not come; the first was here, and its mover has had no answer."""
    (tmp_path / "b").mkdir()
    with serving(tmp_path) as source:
        source.at_work()
        with serving(tmp_path / "b", remembers_at=str(tmp_path / "b/c")) as destination:
            halfway(source.client(), other := destination.client())
            (tmp_path / "bad").write_bytes(b"no image")
            with pytest.raises(ControlError):
                other.ask("load", path=str(tmp_path / "bad"), move="n")
        for path in ("s", "c"):
            (tmp_path / "b" / path).unlink(missing_ok=True)
        with serving(tmp_path / "b", remembers_at=str(tmp_path / "b/c")) as destination:
            assert fates(destination.client())["m"] == "lost"


@pytest.mark.parametrize(
    ("content", "moves"),
    [
        (b"", {}),
        (b"\xff\xfe\0", {}),
        (b"Move: \xe9\n", {}),
        (b"Move: m", {"m": "moved"}),
        (b"text\nMove: m\n", {"m": "moved"}),
        (b"x" * 100_000 + b"\nMove: m\n", {}),
    ],
)
def test_a_marker_of_somebody_else_holds_the_device_all_the_same(tmp_path, content, moves):
    (tmp_path / "c.moved").write_bytes(content)
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        client = those.client()
        assert (client.ask("status")["moved"], fates(client)) == (True, moves)


@pytest.mark.parametrize("what", ["a FIFO", "a folder", "not readable"])
def test_a_marker_that_cannot_be_read_holds_the_device_all_the_same(tmp_path, what):
    marker = tmp_path / "c.moved"
    {"a FIFO": lambda: os.mkfifo(marker), "a folder": marker.mkdir, "not readable": lambda: marker.touch(0)}[what]()
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        client = those.client()
        assert (client.ask("status")["moved"], fates(client)) == (True, {})


def test_a_marker_that_is_a_link_to_nothing_counts(tmp_path):
    (tmp_path / "c.moved").symlink_to(tmp_path / "nothing")
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        assert those.client().ask("status")["moved"] is True


def test_a_marker_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    with serving(tmp_path, remembers_at=str(tmp_path / "c")) as those:
        (tmp_path / "c.moved").symlink_to(tmp_path / "victim")
        client = those.client()
        with pytest.raises(ControlError, match="moved: write: it is a symbolic link"):
            client.ask("moved", move="m")
    assert (tmp_path / "victim").read_text() == "precious"


class NotSuspended:
    """A server that cannot hold its device."""

    def hold(self, _holder):
        raise OSError(5, "Input/output error")

    def holds(self, _holder):
        return False


def test_a_device_that_cannot_be_held_was_not_moved(tmp_path):
    possession = Possession(NotSuspended(), None, str(tmp_path / "c"))
    with pytest.raises(OSError, match="Input/output"):
        possession.give_away("m")
    assert list(tmp_path.iterdir()) == []
