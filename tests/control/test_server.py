"""The control socket while the device's thread is busy: it answers, cancels, tells of events, and keeps its limits."""

import fcntl
import json
import os
import select
import socket
import threading

import pytest

from vdpabridge.control.client import ControlError
from vdpabridge.control.errands import Errand, Errands
from vdpabridge.control.moving import move
from vdpabridge.control.requests import Caller, InvalidRequest, Request
from vdpabridge.state.transfer.channel import PIPE_BYTES

from ..support.waiting import wait_until
from .test_methods import raw, serving


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
        reader, writer = os.pipe()
        fill(writer)
        with raw(those) as asking:
            socket.send_fds(asking, [b'{"jsonrpc": "2.0", "id": 1, "method": "save"}\n'], [writer])
            wait_until(lambda: is_saving(client))
        wait_until(lambda: client.ask("status")["state"] == "running")
        assert client.ask("statistics")["procedures"]["save"]["failed"] == 1
        os.close(reader)
        os.close(writer)
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
        lines = listening.makefile("r")
        assert json.loads(lines.readline())["result"] == {"listening": True}
        work, client = those.at_work(), those.client()
        client.ask("suspend")
        client.ask("resume")
        client.ask("save", path=str(tmp_path / "image"))
        with pytest.raises(ControlError):
            client.ask("load", path=str(tmp_path / "image"))
        work.finish()
        told = [json.loads(lines.readline()) for _ in range(6)]
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
            lines = asking.makefile("r")
            refused = [json.loads(lines.readline()) for _ in range(2)]
            assert {each["id"] for each in refused} == {16, 17}
            assert refused[0]["error"]["message"] == "16 requests of this client were not answered yet"
            client.ask("cancel")
            stuck.end()
            answers = [json.loads(lines.readline()) for _ in range(16)]
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
        assert caught.value.__notes__ == [f"nothing was moved; {those.control} resumes"]
        wait_until(lambda: there.ask("status")["procedure"] is None)
        assert client.ask("status")["state"] == "running"
        work.finish()


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
