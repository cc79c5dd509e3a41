"""The control socket while the device's thread is busy: it answers, cancels, tells of events, and keeps its limits."""

import errno
import fcntl
import json
import os
import select
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

from vdpabridge.control import moving as moving_module, server as control_server
from vdpabridge.control.client import ControlClient, ControlError
from vdpabridge.control.errands import Errand, Errands
from vdpabridge.control.moving import MoveFailed, move
from vdpabridge.control.requests import Caller, InvalidRequest, Request
from vdpabridge.device import Capability, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import DeadlineExceeded, VdpaBridgeError
from vdpabridge.state.transfer.channel import PIPE_BYTES

from ..linux.test_descriptors import lingering
from ..support.mount import Mount
from ..support.waiting import wait_until
from .test_methods import Served, raw, serving
from .test_possession import halfway


class Stuck:
    """A save that does not get on: nobody reads what it writes."""

    def __init__(self, those, **params):
        self.client = those.client()
        self.reader, self.writer = os.pipe()
        self.error = None
        self.result = None
        self._params = params
        self._thread = threading.Thread(target=self._ask)

    def _ask(self):
        try:
            self.result = self.client.ask("save", self.writer, **self._params)
        except ControlError as error:
            self.error = error

    def __enter__(self):
        fill(self.writer)
        self._thread.start()
        return self

    def __exit__(self, *_):
        os.close(self.reader)
        self.end()
        os.close(self.writer)

    def end(self):
        self._thread.join()


def fill(pipe):
    """Nothing more fits, also if somebody makes it as large as it can be."""
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(pipe, False)
    while select.select([], [pipe], [], 0)[1]:
        os.write(pipe, bytes(4096))


@contextmanager
def full_pipe():
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    fill(writer)
    try:
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


def line_from(client):
    """The next line, or what there is at the end."""
    line = b""
    while not line.endswith(b"\n") and (byte := client.recv(1)):
        line += byte
    return line


def is_saving(client):
    procedure = client.ask("status")["procedure"]
    return procedure is not None and procedure["method"] == "save"


def test_status_is_answered_while_a_procedure_does_not_get_on(tmp_path):
    with serving(tmp_path) as those:
        work, client = those.at_work(), those.client()
        with Stuck(those):
            wait_until(lambda: is_saving(client))
            status = client.ask("status")
            assert (status["state"], status["held"]) == ("suspended", True)
            assert "position" not in status["queues"]["0"], "the device is not asked for it"
            assert status["procedure"]["seconds"] >= status["procedure"]["seconds_since_progress"] > 0
            assert client.ask("statistics")["front_ends"] == 1
        assert client.ask("status")["procedure"] is None
        work.finish()


def test_cancel(tmp_path):
    with serving(tmp_path, timeout_s=60) as those:
        work, client = those.at_work(), those.client()
        assert client.ask("cancel") == {"cancelled": False}
        with Stuck(those) as stuck:
            wait_until(lambda: is_saving(client))
            assert client.ask("cancel") == {"cancelled": True}
            stuck.end()
            assert "it was cancelled" in stuck.error.why
            assert "the device is running now" in str(stuck.error)
        assert client.ask("cancel") == {"cancelled": False}
        client.ask("save", path=str(tmp_path / "image"))
        work.finish()


def test_a_save_ends_with_the_client_that_asked_for_it(tmp_path):
    with serving(tmp_path, timeout_s=60) as those:
        work, client = those.at_work(), those.client()
        with full_pipe() as writer, raw(those) as asking:
            socket.send_fds(asking, [b'{"jsonrpc": "2.0", "id": 1, "method": "save"}\n'], [writer])
            wait_until(lambda: is_saving(client))
        wait_until(lambda: client.ask("status")["state"] == "running")
        assert client.ask("statistics")["procedures"]["save"]["failed"] == 1
        work.finish()


def test_what_was_asked_for_is_done_although_its_client_has_left(tmp_path):
    """But not a save or a load that has not begun: nobody waits for it."""
    with serving(tmp_path, timeout_s=60) as those:
        work, client = those.at_work(), those.client()
        with Stuck(those) as stuck:
            wait_until(lambda: is_saving(client))
            with raw(those) as asking:
                path = json.dumps(str(tmp_path / "image"))
                asking.sendall(
                    b'{"jsonrpc": "2.0", "id": 1, "method": "suspend"}\n'
                    b'{"jsonrpc": "2.0", "id": 2, "method": "save", "params": {"path": %s}}\n' % path.encode()
                )
                # taken in before it leaves
                wait_until(lambda: sum(len(each.open) for each in those.server.also_served._clients.values()) == 3)
            client.ask("cancel")
            stuck.end()
        wait_until(lambda: client.ask("status")["procedure"] is None)
        assert client.ask("status")["state"] == "suspended"
        assert not (tmp_path / "image").exists()
        assert client.ask("statistics")["procedures"]["save"]["failed"] == 1, (
            "the one that was cancelled; this has not begun"
        )
        assert client.ask("resume") == {"state": "running"}
        work.finish()


def test_events(tmp_path):
    with serving(tmp_path) as those, raw(those) as listening:
        listening.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "listen"}\n')
        listening.settimeout(10)
        assert json.loads(line_from(listening))["result"] == {"listening": True}
        work, client = those.at_work(), those.client()
        client.ask("suspend")
        client.ask("resume")
        client.ask("save", path=str(tmp_path / "image"))
        with pytest.raises(ControlError):
            client.ask("load", path=str(tmp_path / "image"))
        work.finish()
        told = [json.loads(line_from(listening)) for _ in range(6)]
        assert all(each["method"] == "event" for each in told)
        facts = [each["params"] for each in told]
        assert facts[:3] == [
            {"event": "suspended", "state": "suspended"},
            {"event": "resumed", "state": "running"},
            {"event": "save begins"},
        ]
        assert (facts[3]["event"], set(facts[3])) == ("save done", {"event", "state_bytes", "seconds"})
        assert facts[4] == {"event": "load begins"}
        assert (facts[5]["event"], "not while the device is running" in facts[5]["why"]) == ("load failed", True)


def test_a_client_that_asks_too_much_at_once(tmp_path):
    with serving(tmp_path, timeout_s=60) as those:
        work, client = those.at_work(), those.client()
        with Stuck(those) as stuck, raw(those) as asking:
            wait_until(lambda: is_saving(client))
            asking.settimeout(10)
            asking.sendall(
                b"".join(b'{"jsonrpc": "2.0", "id": %d, "method": "suspend"}\n' % number for number in range(18))
            )
            refused = [json.loads(line_from(asking)) for _ in range(2)]
            assert {each["id"] for each in refused} == {16, 17}
            assert refused[0]["error"]["message"] == "16 requests of this client were not answered yet"
            client.ask("cancel")
            stuck.end()
            answers = [json.loads(line_from(asking)) for _ in range(16)]
            assert [each["id"] for each in answers] == list(range(16)), "in the order in which they were asked"
        client.ask("resume")
        work.finish()


def test_the_server_ends_while_requests_wait(tmp_path):
    """Their clients are told by the end of the connection."""
    with serving(tmp_path, timeout_s=60) as those:
        those.at_work()
        client = those.client()
        with Stuck(those) as stuck:
            wait_until(lambda: is_saving(client))
            with raw(those) as asking:
                asking.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "suspend"}\n')
                those.server.stop()
                client.ask("cancel")
                stuck.end()


def test_a_move_that_is_interrupted_cancels_both_ends(tmp_path, monkeypatch):
    """The destination waits for what does not come, and the source's thread is not joined for ever."""
    (tmp_path / "b").mkdir()
    with serving(tmp_path, timeout_s=60) as those, serving(tmp_path / "b", timeout_s=60) as others:
        work, client, there = those.at_work(), those.client(), others.client()
        source, destination = those.client(), others.client()

        def interrupted(method, *_fds, **_params):
            assert method == "save"
            wait_until(lambda: there.ask("status")["procedure"] is not None)
            raise KeyboardInterrupt

        monkeypatch.setattr(source, "ask", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            move(source, destination)
        assert caught.value.__notes__ == [
            f"nothing was moved; {those.control} does again what it did before",
            f"if {others.control} has got the state, it does not start",
        ]
        wait_until(lambda: there.ask("status")["procedure"] is None)
        assert client.ask("status")["state"] == "running"
        work.finish()


def test_a_move_that_fails_leaves_a_suspended_device_suspended(tmp_path):
    """Whoever has asked for that has not asked for the opposite."""
    (tmp_path / "other").mkdir()
    with serving(tmp_path) as those, serving(tmp_path / "other") as others:
        work, source, destination = those.at_work(), those.client(), others.client()
        source.ask("suspend")
        others.device.faults.fail_check = True
        with pytest.raises(MoveFailed, match=f"{those.control} is suspended; nothing was moved"):
            move(source, destination)
        assert those.client().ask("status")["state"] == "suspended"
        those.client().ask("resume")
        work.finish()


def test_a_client_that_only_sends_a_notification_is_hung_up_on(tmp_path):
    with serving(tmp_path) as those, raw(those) as client:
        client.sendall(b'{"jsonrpc": "2.0", "method": "suspend"}\n')
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""


def test_two_movers_never_both_have_it_moved(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with serving(tmp_path) as those, serving(tmp_path / "first") as others, serving(tmp_path / "second") as third:
        work = those.at_work()
        first, second = those.client(), those.client()
        halfway(first, others.client())
        with pytest.raises(MoveFailed, match="another client is moving its state"):
            move(second, third.client())
        with pytest.raises(ControlError, match="another client is moving its state"):
            second.ask("moved", move="m")
        assert first.ask("moved", move="m") == {"state": "suspended"}
        with pytest.raises(ControlError, match="its state was moved to another device"):
            second.ask("moved", move="m")
        with pytest.raises(ControlError, match="its state was moved"):
            second.ask("save", path=str(tmp_path / "image"))
        assert second.ask("resume", force=True) == {"state": "running"}
        work.finish()


@pytest.mark.parametrize("method", ["status", "statistics", "suspend", "save"])
def test_a_client_that_only_sends_and_then_listens_is_answered(tmp_path, method):
    """As `nc -N` does: it has closed its sending side before it reads."""
    with serving(tmp_path) as those:
        work = those.at_work()
        params = {"path": str(tmp_path / "image")} if method == "save" else {}
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        for _ in range(5):
            with raw(those) as client:
                client.sendall(json.dumps(request).encode() + b"\n")
                client.shutdown(socket.SHUT_WR)
                assert "result" in json.loads(line_from(client))
                assert line_from(client) == b"", "and is hung up on then"
        those.client().ask("resume")
        work.finish()


def test_a_move_that_is_interrupted_while_the_destination_loads(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    with serving(tmp_path, timeout_s=60) as those, serving(tmp_path / "b", timeout_s=60) as others:
        work, source, destination = those.at_work(), those.client(), others.client()

        class Interrupted(threading.Thread):
            """Ctrl-C when it is waited for, once."""

            def join(self, timeout=None):
                if not interruptions:
                    interruptions.append(1)
                    raise KeyboardInterrupt
                super().join(timeout)

        interruptions = []
        monkeypatch.setattr(moving_module, "threading", SimpleNamespace(Thread=Interrupted))
        with pytest.raises(KeyboardInterrupt) as caught:
            move(source, destination)
        assert caught.value.__notes__ == [
            f"nothing was moved; {those.control} does again what it did before",
            f"if {others.control} has got the state, it does not start",
        ]
        wait_until(lambda: those.client().ask("status")["state"] == "running")
        work.finish()


def test_descriptors_of_one_request_are_not_the_next_ones(tmp_path):
    with serving(tmp_path) as those, raw(those) as client, open(os.devnull, "wb") as nothing:
        those.at_work()
        for method in ("statistics", "nonsense"):
            line = b'{"jsonrpc": "2.0", "id": 1, "method": "%s"}\n' % method.encode()
            socket.send_fds(client, [line], [nothing.fileno()])
            line_from(client)
        client.sendall(b'{"jsonrpc": "2.0", "id": 2, "method": "save"}\n')
        assert (
            "neither a descriptor nor a path came with the request" in json.loads(line_from(client))["error"]["message"]
        )


def test_descriptors_that_are_slow_to_close_stop_nobody(tmp_path):
    """More than a request can have, and one that a procedure is done with."""
    slow, peer = lingering()
    with (
        ExitStack() as stack,
        serving(tmp_path) as those,
        raw(those) as client,
        open(os.devnull, "wb") as nothing,
        peer,
    ):
        work, other = those.at_work(), stack.enter_context(ControlClient(those.control, timeout_s=5))
        socket.send_fds(client, [b"x"], [nothing.fileno()] * 4 + [slow])
        line = b'{"jsonrpc": "2.0", "id": 1, "method": "save", "params": {"stay": 5}}\n'
        with raw(those) as second:
            socket.send_fds(second, [line], [slow])
            os.close(slow)
            assert "error" in json.loads(line_from(second))
        # whoever closed it would wait for 10 s
        assert other.ask("status")["state"] == "running"
        work.finish()
        peer.recv(1 << 20)


def test_nobody_is_answered_who_does_not_want_to_be(tmp_path):
    with serving(tmp_path) as those, raw(those) as client:
        client.sendall(
            b'{"jsonrpc": "2.0", "method": "status"}\n'
            b'{"jsonrpc": "2.0", "method": "status", "params": []}\n'
            b'{"jsonrpc": "2.0", "id": 3, "method": "statistics"}\n'
        )
        assert json.loads(line_from(client))["id"] == 3


def test_no_descriptor_is_left_to_cancel_by(tmp_path, monkeypatch):
    def none_left(_request):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with serving(tmp_path) as those:
        work, client = those.at_work(), those.client()
        with monkeypatch.context() as patch:
            patch.setattr(Request, "make_cancellable", none_left)
            with pytest.raises(ControlError, match="Too many open files"):
                client.ask("save", path=str(tmp_path / "image"))
        assert client.ask("status")["state"] == "running"
        work.finish()


def test_a_second_save_that_fails_does_not_give_back_what_the_first_holds(tmp_path):
    with serving(tmp_path) as those:
        work, client = those.at_work(), those.client()
        client.ask("save", path=str(tmp_path / "image"), stay="connection")
        with pytest.raises(ControlError):
            client.ask("save", path="/nowhere/image", stay="connection")
        assert client.ask("status")["state"] == "suspended"
        client.ask("resume")
        work.finish()


def test_a_load_from_a_fifo_that_nobody_writes_to_is_cancelled(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with serving(tmp_path, timeout_s=60) as those, raw(those) as asking:
        client = those.client()
        params = json.dumps({"path": str(tmp_path / "fifo")})
        asking.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "load", "params": %s}\n' % params.encode())
        wait_until(lambda: client.ask("status")["procedure"] is not None)
        assert client.ask("cancel") == {"cancelled": True}
        assert "it was cancelled" in json.loads(line_from(asking))["error"]["message"]


class SlowToCheck(Sim):
    checking = None

    def _check_state(self):
        if self.checking is not None:
            self.checking.set()
            time.sleep(0.5)
        super()._check_state()


def test_a_load_that_is_cancelled_in_its_last_step_is_not_done(tmp_path):
    with serving(tmp_path) as those:
        those.at_work()
        those.client().ask("save", path=str(tmp_path / "image"))
    (tmp_path / "b").mkdir()
    with serving(tmp_path / "b", SlowToCheck) as those, raw(those) as asking:
        client = those.client()
        those.device.checking = threading.Event()
        params = json.dumps({"path": str(tmp_path / "image")})
        asking.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "load", "params": %s}\n' % params.encode())
        assert those.device.checking.wait(10)
        assert client.ask("cancel") == {"cancelled": True}
        assert "it was cancelled" in json.loads(line_from(asking))["error"]["message"]
        assert client.ask("status")["state"] == "reset"


class HardToResume(Sim):
    """Cannot be resumed, as often as ``refusals`` says, and not suspended as often as ``slow`` says."""

    refusals = slow = 0
    error = VdpaBridgeError("resume", why="not now")

    def _resume(self):
        if self.refusals:
            self.refusals -= 1
            raise self.error
        super()._resume()

    def _suspend(self, *, drain):
        super()._suspend(drain=drain)
        if self.slow:
            self.slow -= 1
            raise DeadlineExceeded("suspend", 1, device=self.name)


class Starving(HardToResume):
    error = OSError(errno.EMFILE, "Too many open files")


class Strict(HardToResume):
    error = ValueError("a ring of 3")


def test_who_has_left_is_put_right_as_soon_as_that_is_possible(tmp_path, monkeypatch):
    monkeypatch.setattr(control_server, "_AGAIN_S", 0.05)
    with serving(tmp_path, HardToResume) as those:
        work, client = those.at_work(), those.client()
        with raw(those) as holding:
            params = json.dumps({"path": str(tmp_path / "image"), "stay": "connection"})
            holding.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "save", "params": %s}\n' % params.encode())
            assert "result" in json.loads(line_from(holding))
            those.device.refusals = 3
        wait_until(lambda: client.ask("status")["state"] == "running")
        assert client.ask("status")["held"] is False
        assert len([report for report in those.reports if "had left" in report]) == 1
        work.finish()


@pytest.mark.parametrize("kind", [HardToResume, Starving, Strict])
@pytest.mark.parametrize("stay", [False, True])
def test_a_save_whose_client_has_left_and_whose_resume_fails_once(tmp_path, monkeypatch, stay, kind):
    """Nobody is there to be told, and nobody has asked for a suspended device."""
    monkeypatch.setattr(control_server, "_AGAIN_S", 0.05)
    with serving(tmp_path, kind, timeout_s=60) as those:
        work, client = those.at_work(), those.client()
        with full_pipe() as writer, raw(those) as asking:
            line = b'{"jsonrpc": "2.0", "id": 1, "method": "save", "params": {"stay": %s}}\n'
            socket.send_fds(asking, [line % json.dumps(stay).encode()], [writer])
            wait_until(lambda: is_saving(client))
            those.device.refusals = 2
        wait_until(lambda: client.ask("status")["state"] == "running")
        assert client.ask("status")["held"] is False
        work.finish()


@pytest.mark.parametrize("method", ["suspend", "save"])
def test_a_suspend_that_fails_and_cannot_be_undone_is_undone_later(tmp_path, monkeypatch, method):
    """The device has stopped all the same, and nobody holds it: its guest would wait for ever."""
    monkeypatch.setattr(control_server, "_AGAIN_S", 0.05)
    params = {"path": str(tmp_path / "image")} if method == "save" else {}
    with serving(tmp_path, HardToResume) as those:
        work = those.at_work()
        with ControlClient(those.control, timeout_s=10) as asking:
            those.device.slow, those.device.refusals = 1, 2
            with pytest.raises(ControlError, match="ask for 'resume' until that succeeds"):
                asking.ask(method, **params)
        work.finish()
        assert those.client().ask("status")["held"] is False


@pytest.mark.parametrize(("kind", "why"), [(Starving, "Too many open files"), (Strict, "a ring of 3")])
def test_whatever_keeps_it_from_resuming_is_told_with_what_to_do(tmp_path, kind, why):
    with serving(tmp_path, kind) as those:
        work, client = those.at_work(), those.client()
        client.ask("suspend")
        those.device.refusals = 1
        with pytest.raises(ControlError, match=f"{why}.*ask for 'resume' until that succeeds") as caught:
            client.ask("resume")
        assert caught.value.device == those.device.name or caught.value.why
        client.ask("resume")
        work.finish()


def test_who_leaves_lets_go_of_all_that_it_held(tmp_path):
    """A hold by its connection, and one that a failed save has left to put right."""
    with serving(tmp_path, HardToResume) as those:
        work, client = those.at_work(), those.client()
        with ControlClient(those.control, timeout_s=10) as asking:
            those.device.refusals = 1
            with pytest.raises(ControlError):
                asking.ask("save", path=str(tmp_path / "image"), limit_bytes=1)
            asking.ask("save", path=str(tmp_path / "image"), stay="connection")
            assert client.ask("status")["held"] is True
        wait_until(lambda: client.ask("status")["held"] is False)
        work.finish()


class Stateless(HardToResume):
    """A device that cannot resume, nor give its own state: to resume, it is reset, and has lost that."""

    capabilities = frozenset(Capability) - {Capability.DEVICE_STATE, Capability.RESUME}


def test_a_save_that_is_refused_has_not_stopped_the_device(tmp_path):
    with ExitStack() as stack:
        device = stack.enter_context(Stateless.fs(timeout_s=5))
        those = Served(stack, tmp_path, device)
        front = stack.enter_context(VhostUser.open(those.path, device_id=26, timeout_s=10))
        mount = Mount(stack, front)
        with pytest.raises(ControlError, match="the device cannot give it"):
            those.client().ask("save", path=str(tmp_path / "image"))
        assert mount.read() == b"These"


def test_what_lasts_replaces_what_a_connection_holds(tmp_path):
    with serving(tmp_path) as those:
        work, client = those.at_work(), those.client()
        client.ask("save", path=str(tmp_path / "image"), stay="connection")
        client.ask("suspend")
        assert len(those.server.holders) == 1
        # another client may end it
        assert those.client().ask("resume") == {"state": "running"}
        client.ask("suspend")
        client.ask("moved", move="m")
        assert len(those.server.holders) == 1
        assert client.ask("resume", force=True) == {"state": "running"}
        work.finish()


def test_requests_that_were_answered_are_forgotten(tmp_path):
    with serving(tmp_path) as those:
        client = those.client()
        for _ in range(10):
            client.ask("status")
        wait_until(lambda: not those.server.also_served._requests)


def test_what_is_tried_again_does_not_end_the_suspend_of_another_client(tmp_path):
    with serving(tmp_path, HardToResume) as those:
        work, client = those.at_work(), those.client()
        with ControlClient(those.control, timeout_s=10) as saving:
            those.device.refusals = 1
            with pytest.raises(ControlError):
                saving.ask("save", path=str(tmp_path / "image"), stay=True, limit_bytes=1)
            assert those.device.refusals == 0
            client.ask("suspend")
        wait_until(lambda: len(those.server.also_served._clients) == 1)
        assert client.ask("status")["state"] == "suspended"
        assert client.ask("resume") == {"state": "running"}
        work.finish()


def test_resume_says_that_another_client_holds_the_device(tmp_path):
    with serving(tmp_path) as those:
        work, client, other = those.at_work(), those.client(), those.client()
        client.ask("save", path=str(tmp_path / "image"), stay="connection")
        assert other.ask("resume", force=True) == {"state": "suspended", "held": True}
        assert client.ask("resume") == {"state": "running"}
        work.finish()


def test_a_save_of_what_another_client_holds_has_no_blackout(tmp_path):
    with serving(tmp_path) as those:
        work, client, other = those.at_work(), those.client(), those.client()
        client.ask("save", path=str(tmp_path / "image"), stay="connection")
        steps = other.ask("save", path=str(tmp_path / "other"))["steps"]
        assert "resume" not in [step["name"] for step in steps]
        client.ask("release")
        work.finish()


def test_it_is_tried_again_once_however_many_have_failed(tmp_path, monkeypatch):
    """Each failed `resume` says to ask again: the device's thread has other things to do than to try for each of them."""
    monkeypatch.setattr(control_server, "_AGAIN_S", 0.05)
    with serving(tmp_path, HardToResume) as those:
        work = those.at_work()
        suspending = those.client()
        suspending.ask("suspend")
        those.device.refusals = 1 << 30
        for _ in range(20):
            with (
                ControlClient(those.control, timeout_s=10) as client,
                pytest.raises(ControlError, match="ask for 'resume' until that succeeds"),
            ):
                client.ask("resume")
        control = those.server.also_served
        suspending.close()
        wait_until(lambda: not control._clients)
        begun = (1 << 30) - those.device.refusals
        time.sleep(0.5)
        print("N", (1 << 30) - those.device.refusals - begun, begun)
        assert (1 << 30) - those.device.refusals - begun <= 12
        those.device.refusals = 0
        wait_until(lambda: those.device.state is RunState.RUNNING)
        work.finish()


def test_requests_of_clients_that_have_left_are_closed_with_the_server(tmp_path):
    """Also those that were never begun."""
    with serving(tmp_path, timeout_s=60) as those:
        those.at_work()
        client = those.client()
        with Stuck(those) as stuck:
            wait_until(lambda: is_saving(client))
            with raw(those) as asking, open(os.devnull, "wb") as nothing:
                line = b'{"jsonrpc": "2.0", "id": 1, "method": "save"}\n'
                socket.send_fds(asking, [line], [nothing.fileno()])
                wait_until(lambda: len(those.server.also_served._requests) == 2)
            wait_until(lambda: len(those.server.also_served._clients) == 2)
            those.server.stop()
            client.ask("cancel")
            stuck.end()


# --- the parts ---


@pytest.mark.parametrize(
    ("line", "code", "number", "silent"),
    [
        (b"{", -32700, None, False),
        (b'{"jsonrpc": "2.0", "method": "x", "id": NaN}', -32700, None, False),
        (b"[]", -32600, None, False),
        (b'{"jsonrpc": "1.0", "method": "x", "id": 1}', -32600, None, False),
        (b'{"jsonrpc": "2.0", "method": 1, "id": 1}', -32600, None, False),
        (b'{"jsonrpc": "2.0", "method": "x", "id": []}', -32600, None, False),
        (b'{"jsonrpc": "2.0", "method": "x", "id": 1e999}', -32600, None, False),
        (b'{"jsonrpc": "2.0", "method": "x", "id": 7, "params": []}', -32602, 7, False),
        (b'{"jsonrpc": "2.0", "method": "x", "params": []}', -32602, None, True),
    ],
)
def test_what_is_not_a_request(line, code, number, silent):
    with pytest.raises(InvalidRequest) as caught:
        Request.parse(line, Caller())
    assert caught.value.outcome["error"]["code"] == code
    assert (caught.value.number, caught.value.silent) == (number, silent)


def test_a_request_closes_what_nobody_took():
    request = Request.parse(b'{"jsonrpc": "2.0", "method": "x"}', Caller())
    assert not request.wants_answer
    request.fds = list(os.pipe())
    taken = request.take_fd()
    request.make_cancellable()
    assert request.cancel()
    assert select.select([request.cancel_fd], [], [], 0)[0]
    request.close()
    request.close()
    os.close(taken)
    assert not request.cancel()


def test_an_errand_is_done_once():
    errands, done = Errands(), []
    try:
        first, second = Errand(lambda: done.append(1)), Errand(lambda: done.append(2))
        errands.put(first)
        errands.put(second)
        assert first.claim(), "somebody answers for it"
        errands.run_one()
        errands.run_one()
        assert done == [2]
        assert not second.claim()
        with pytest.raises(BlockingIOError):
            errands.run_one()
    finally:
        errands.close()
        errands.close()
