"""What the control socket does to a device: who holds it, who lets it go on, and what is said of it when that fails."""

import errno
import json
import os
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from vdpabridge.abi.vhost_user import FrontendRequest as F
from vdpabridge.abi.vhost_user_payloads import U64, Config
from vdpabridge.control import methods, server as control_server_module
from vdpabridge.control.client import ControlClient, ControlError
from vdpabridge.control.lines import FDS_MAX
from vdpabridge.control.methods import control_server
from vdpabridge.control.moving import MoveFailed, move
from vdpabridge.control.possession import Possession
from vdpabridge.device import Capability, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import DeadlineExceeded, KernelError, UsageError, VdpaBridgeError
from vdpabridge.export.vhost_user.server import Server, listen
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.procedures import verify
from vdpabridge.vhost_user.connection import Connection

from ..support.disk_lab import DISK_BYTES, Lab, limits
from ..support.scripted import scripted
from ..support.waiting import wait_until


class Served:
    """A device that is served, and can be asked about, by a thread of this process."""

    def __init__(self, stack, folder, device, timeout_s=5, remembers_at=None):
        self.path, self.control = str(folder / "s"), str(folder / "c")
        self.device = device
        self.reports = []
        listener = stack.enter_context(listen(self.path))
        self.server = stack.enter_context(Server(device, report=self.reports.append, timeout_s=timeout_s))
        control = stack.enter_context(listen(self.control))
        possession = Possession(self.server, self.device, remembers_at)
        answering = control_server(
            control, device, self.server, timeout_s, report=self.reports.append, possession=possession
        )
        self.server.also_served = stack.enter_context(answering)
        thread = threading.Thread(target=self.server.serve, args=[listener])
        thread.start()
        stack.callback(thread.join)
        stack.callback(self.server.stop)
        self._stack = stack

    def client(self):
        return self._stack.enter_context(ControlClient(self.control, timeout_s=10))

    def front_end(self):
        device = VhostUser.open(self.path, device_id=2, config_size_bytes=60, timeout_s=10)
        return self._stack.enter_context(device)

    def at_work(self):
        return Lab(self._stack, self.front_end())


@contextmanager
def serving(folder, cls=Sim, timeout_s=5, remembers_at=None):
    with ExitStack() as stack:
        device = stack.enter_context(cls.blk(DISK_BYTES, timeout_s=5))
        yield Served(stack, folder, device, timeout_s, remembers_at)


def serving_back_end(stack, folder, ours, *, timeout_s, config_size_bytes):
    """The device behind socket ``ours``."""
    connection = Connection(ours, "the back-end", timeout_s=timeout_s)
    device = VhostUser(connection, device_id=2, config_size_bytes=config_size_bytes, timeout_s=timeout_s)
    return Served(stack, folder, stack.enter_context(device))


# --- who holds it ---


def test_a_save_that_fails_at_the_end_lets_the_device_go_on(tmp_path, monkeypatch):
    """The file cannot be put in place: that comes after the image was written."""

    def fail(*_words, **_options):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with serving(tmp_path) as those:
        work, client = those.at_work(), those.client()
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", fail)
            with pytest.raises(ControlError, match="the device is running now"):
                client.ask("save", path=str(tmp_path / "image"))
        assert client.ask("status")["held"] is False
        client.ask("save", path=str(tmp_path / "image"))
        assert client.ask("status")["state"] == "running"
        work.finish()


def test_a_save_that_fails_says_that_the_device_runs(tmp_path):
    with serving(tmp_path) as those:
        work, client = those.at_work(), those.client()
        reader, writer = os.pipe()
        os.close(reader)
        with pytest.raises(ControlError, match=r"Broken pipe.*the device is running now"):
            client.ask("save", writer)
        os.close(writer)
        work.finish()


def test_a_suspend_that_ends_too_late_is_ended_before_the_device_goes_on(tmp_path):
    """A back-end behind us stops its ring after our deadline: it is told to go on all the same."""
    with scripted() as (back_end, ours), ExitStack() as stack:
        those = serving_back_end(stack, tmp_path, ours, timeout_s=10, config_size_bytes=60)
        front, client = those.front_end(), those.client()

        def wait(message):
            time.sleep(1.5)
            return back_end.right(message)

        start(stack, front)
        those.device.timeout_s = 1
        back_end.answers[F.GET_VRING_BASE] = wait
        since = len(back_end.log)
        with pytest.raises(ControlError, match="the device is running now"):
            client.ask("save", path=str(tmp_path / "image"))
        back_end.answers.clear()
        assert "SET_VRING_KICK" in back_end.names(since), "it was started again"
        assert client.ask("status")["state"] == "running"


def start(stack, front):
    memory = stack.enter_context(GuestMemory(1 << 20))
    queue = stack.enter_context(SplitQueue(memory, 16))
    front.map([memory.region])
    front.accept_features(1 << 32)
    queue.attach(front, 0)
    front.start()


class Refusing(Sim):
    """It fails by itself while it is being stopped, and has no RESUME."""

    capabilities = frozenset(Capability) - {
        Capability.RESUME,
        Capability.SETUP_WHILE_SUSPENDED,
        Capability.QUEUE_CONTROL,
    }
    fails = False

    def _suspend(self, **options):
        if self.fails:
            raise self._fail("NEEDS_RESET")
        super()._suspend(**options)


def test_a_device_that_failed_is_not_started_where_it_once_stood(tmp_path):
    """Its requests would be done again. Its front-end is hung up on: it has not asked for anything, and would wait."""
    with serving(tmp_path, Refusing) as those:
        work, client = those.at_work(), those.client()
        work.disk.settle(work.disk.driver.drain())
        used = work.queue.device_used_index
        those.device.fails = True
        with pytest.raises(ControlError, match="NEEDS_RESET"):
            client.ask("suspend")
        wait_until(lambda: those.device.state is RunState.RESET)
        assert work.queue.device_used_index == used


def test_a_suspend_that_never_ends_is_not_known_to_have(tmp_path):
    """Nobody is told that the device runs; and once it answers, "resume" has it go on."""
    mute = threading.Event()
    with scripted() as (back_end, ours), ExitStack() as stack:
        those = serving_back_end(stack, tmp_path, ours, timeout_s=0.2, config_size_bytes=60)
        front, client = those.front_end(), those.client()

        def wait(message):
            mute.wait(10)
            return back_end.right(message)

        start(stack, front)
        back_end.answers[F.GET_VRING_BASE] = wait
        with pytest.raises(ControlError, match="it is not known whether the device runs"):
            client.ask("save", path=str(tmp_path / "image"))
        assert client.ask("status")["held"] is True
        with pytest.raises(ControlError):
            client.ask("resume")
        mute.set()
        back_end.answers.clear()
        since = len(back_end.log)
        those.device.timeout_s = 5
        assert client.ask("resume")["state"] == "running"
        assert "SET_VRING_KICK" in back_end.names(since)
        assert client.ask("status")["held"] is False


def test_an_error_that_nobody_thought_of_lets_go_too(tmp_path, monkeypatch):
    """As close(2) of a file on a network file system that is full."""
    with serving(tmp_path) as those:
        work, client = those.at_work(), those.client()

        def fail(*_words, **_options):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        with monkeypatch.context() as patch:
            patch.setattr(methods, "save", fail)
            with pytest.raises(ControlError, match="quota"):
                client.ask("save", path=str(tmp_path / "image"))
        assert client.ask("status")["held"] is False
        work.finish()


def test_a_load_that_fails_does_not_end_the_process(tmp_path):
    """A back-end that takes the state and does not say what became of it."""
    image = tmp_path / "image"
    with serving(tmp_path) as those:
        those.at_work()
        those.client().ask("save", path=str(image))
    mute = threading.Event()
    (tmp_path / "b").mkdir()
    with scripted() as (back_end, ours), ExitStack() as stack:
        those = serving_back_end(stack, tmp_path / "b", ours, timeout_s=1, config_size_bytes=96)

        def swallow(message):
            for fd in message.take_fds():
                threading.Thread(target=drain, args=[fd]).start()
            return [(F.SET_DEVICE_STATE_FD, 5, U64(0x100).pack(), ())]

        back_end.answers[F.SET_DEVICE_STATE_FD] = swallow
        back_end.answers[F.GET_CONFIG] = lambda message: [(F.GET_CONFIG, 5, config_of(message), ())]
        back_end.answers[F.CHECK_DEVICE_STATE] = lambda message: (mute.wait(10), back_end.right(message))[1]
        client = those.client()
        with pytest.raises(ControlError, match="no answer within"):
            client.ask("load", path=str(image))
        mute.set()
        assert client.ask("statistics")["procedures"]["load"]["failed"] == 1


def drain(fd):
    with open(fd, "rb") as file:
        while file.read(1 << 16):
            continue


def config_of(message):
    """What the simulator says."""
    with Sim.blk(DISK_BYTES) as device:
        asked = Config.unpack(message.payload)
        return Config(asked.offset, asked.size_bytes, asked.flags, device.read_config()).pack()


class LateToGoOn(Sim):
    """It goes on, and does not say so in time."""

    late = False

    def _resume(self):
        super()._resume()
        if self.late:
            raise DeadlineExceeded("RESUME", 1, device=self.name)


def test_a_device_that_may_have_gone_on_is_asked_again_where_it_stands(tmp_path):
    """Its positions of before would have another device do again what it has done since."""
    with serving(tmp_path, LateToGoOn) as those:
        work, client = those.at_work(), those.client()
        those.device.late = True
        with pytest.raises(ControlError, match="RESUME"):
            client.ask("save", path=str(tmp_path / "image"))
        assert client.ask("status")["held"] is True
        work.disk.settle(work.disk.driver.drain())
        those.device.late = False
        client.ask("save", path=str(tmp_path / "image"), stay=True)
        with (tmp_path / "image").open("rb") as file:
            facts = verify(file.fileno(), limits())
        assert facts.snapshot.queues[0].base.avail_index == work.queue.device_used_index
        assert client.ask("resume")["state"] == "running"
        work.finish()


def test_a_failed_device_is_the_guests_again_when_it_has_reset_it(tmp_path):
    with serving(tmp_path, Refusing) as those, ExitStack() as stack:
        front, client = those.front_end(), those.client()
        start(stack, front)
        those.device.fails = True
        with pytest.raises(ControlError):
            client.ask("suspend")
        assert client.ask("status")["held"] is False


def test_who_holds_it_by_a_connection_holds_it_until_the_last_one(tmp_path):
    """Two migrations at once: there is one at a time, and whatever others ask, its device does not run meanwhile."""
    with serving(tmp_path) as those, open(os.devnull, "wb") as nowhere:
        work, watcher = those.at_work(), those.client()
        first, second = those.client(), those.client()
        first.ask("save", nowhere.fileno(), stay="connection")
        with pytest.raises(ControlError, match="another client is moving its state"):
            second.ask("save", nowhere.fileno(), stay="connection")
        second.close()
        watcher.ask("resume")
        assert watcher.ask("status")["state"] == "suspended"
        first.close()
        wait_until(lambda: watcher.ask("status")["state"] == "running")
        work.finish()


def test_a_hold_outlives_front_ends(tmp_path):
    with serving(tmp_path) as those, ExitStack() as stack:
        client = those.client()
        client.ask("suspend")
        start(stack, those.front_end())
        assert client.ask("status")["state"] != "running"
        client.ask("save", path=str(tmp_path / "image"))
        assert client.ask("status")["held"] is True
        assert client.ask("resume")["state"] == "running"


class CannotGoOn(Sim):
    def _resume(self):
        raise KernelError(errno.EIO, "RESUME", device=self.name)


def test_who_has_left_does_not_end_the_process_that_owns_the_device(tmp_path):
    with serving(tmp_path, CannotGoOn) as those, open(os.devnull, "wb") as nowhere:
        work = those.at_work()
        client, watcher = those.client(), those.client()
        client.ask("save", nowhere.fileno(), stay="connection")
        client.close()
        wait_until(lambda: those.reports)
        assert "had left: sim:blk: RESUME: EIO" in those.reports[0]
        assert watcher.ask("status")["state"] == "suspended"
        those.device.__class__ = Sim
        assert watcher.ask("resume")["state"] == "running"
        work.finish()


# --- descriptors ---


def test_a_descriptor_belongs_to_the_request_that_it_came_with(tmp_path):
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    with serving(tmp_path) as those, wrong.open("wb") as first, right.open("wb") as second:
        work, client = those.at_work(), those.client()
        with pytest.raises(ControlError):
            client.ask("save", first.fileno(), stay="forever")
        client.ask("status", first.fileno())
        client.ask("save", second.fileno())
        assert (wrong.stat().st_size, right.stat().st_size > 1000) == (0, True)
        work.finish()


def test_a_descriptor_is_not_taken_by_a_line_before_its_own(tmp_path):
    """Two requests and a descriptor in one message: it is the last one's."""
    image = tmp_path / "image"
    lines = [{"jsonrpc": "2.0", "id": number, "method": method} for number, method in ((1, "save"), (2, "save"))]
    with serving(tmp_path) as those, image.open("wb") as file, socket.socket(socket.AF_UNIX) as client:
        work = those.at_work()
        client.settimeout(10)
        client.connect(those.control)
        socket.send_fds(client, ["".join(json.dumps(line) + "\n" for line in lines).encode()], [file.fileno()])
        answers = b""
        while answers.count(b"\n") < len(lines):
            answers += client.recv(65536)
        first, second = map(json.loads, answers.splitlines())
        assert "neither a descriptor nor a path came with the request" in first["error"]["message"]
        assert second["result"]["state_bytes"] > 1000
        work.finish()


def test_a_fifo_that_nobody_writes_to_is_no_trap(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with serving(tmp_path, timeout_s=0.2) as those, pytest.raises(ControlError, match="nobody writes to it"):
        those.client().ask("load", path=str(fifo))


# --- who means ill, or is mistaken ---


@contextmanager
def raw(those):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(those.control)
        yield client


def test_a_number_that_is_none(tmp_path):
    with serving(tmp_path) as those, raw(those) as client:
        nested = b"[" * 900 + b"]" * 900
        client.sendall(b'{"jsonrpc": "2.0", "method": "status", "id": ' + nested + b"}\n")
        assert json.loads(client.recv(65536))["error"]["code"] == -32600
        assert those.client().ask("status")["state"] == "reset"


def again_and_again(send):
    for _ in range(1000):
        send()


@pytest.mark.parametrize("what", ["a line without end", "descriptors that nobody wants"])
def test_who_sends_too_much_is_hung_up_on(tmp_path, what):
    with serving(tmp_path) as those, raw(those) as client, open(os.devnull, "rb") as nothing:
        send = {
            "a line without end": lambda: client.sendall(b"x" * 65536),
            "descriptors that nobody wants": lambda: socket.send_fds(client, [b"x"], [nothing.fileno()] * FDS_MAX),
        }[what]
        with pytest.raises(ConnectionError):
            again_and_again(send)
        assert those.client().ask("status")["state"] == "reset"


def test_who_does_not_read_misses_events(tmp_path):
    """Nobody waits for it: not the guest, who may be suspended, and no other client."""
    with serving(tmp_path) as those:
        those.client().ask("listen")
        for _ in range(20_000):
            those.server.also_served.tell({"event": "something happened"})
        assert those.client().ask("status")["state"] == "reset"


def move_fails(source, destination):
    with pytest.raises(VdpaBridgeError, match="not JSON"):
        move(source, destination)


def test_a_destination_that_talks_nonsense(tmp_path):
    with serving(tmp_path) as those, listen(str(tmp_path / "odd")) as odd:
        work, source = those.at_work(), those.client()

        def answer():
            connection, _ = odd.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"what?\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with ControlClient(str(tmp_path / "odd"), timeout_s=10) as destination:
            move_fails(source, destination)
        thread.join()
        assert source.ask("status")["state"] == "running"
        work.finish()


def test_an_answer_that_comes_too_late_is_not_the_next_ones(tmp_path):
    with listen(str(tmp_path / "slow")) as listener, ControlClient(str(tmp_path / "slow"), timeout_s=0.2) as client:
        connection, _ = listener.accept()
        with connection:
            with pytest.raises(VdpaBridgeError):
                client.ask("save")
            connection.sendall(b'{"jsonrpc": "2.0", "id": 1, "result": "late"}\n')
            connection.sendall(b'{"jsonrpc": "2.0", "id": 2, "result": "right"}\n')
            assert client.ask("status") == "right"


def test_the_protocol_is_written_down(tmp_path):
    text = (Path(methods.__file__).parent / "PROTOCOL.md").read_text()
    with (
        Sim.blk(DISK_BYTES) as device,
        Server(device, report=print) as server,
        listen(str(tmp_path / "c")) as listener,
        control_server(listener, device, server, None, report=print) as control,
    ):
        names = set(control.methods)
    assert names == set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_a_move_that_fails_has_the_source_resume_while_its_caller_stays_connected(tmp_path):
    (tmp_path / "b").mkdir()
    with serving(tmp_path) as those, serving(tmp_path / "b") as others:
        work, source, destination = those.at_work(), those.client(), others.client()
        # all bytes have gone by then, and the source has done its part
        others.device.faults.fail_check = True
        with pytest.raises(MoveFailed, match="told to fail") as caught:
            move(source, destination)
        assert caught.value.side == others.control
        assert source.ask("status")["state"] == "running"
        assert f"{those.control} is running; nothing was moved" in caught.value.hint
        work.finish()


def test_state_that_is_loaded_ends_a_move(tmp_path):
    """There and back again: the source runs for its next front-end without being forced."""
    (tmp_path / "b").mkdir()
    with serving(tmp_path) as those, serving(tmp_path / "b") as others:
        one, other = those.client(), others.client()
        front = those.front_end()
        Lab(those._stack, front)
        move(one, other)
        with pytest.raises(ControlError, match="its state was moved to another device"):
            one.ask("resume")
        with pytest.raises(ControlError, match="force 'false' is neither true nor false"):
            one.ask("resume", force="false")
        assert one.ask("status")["moved"] is True
        # nor can it be given to a third
        with pytest.raises(ControlError, match="save: its state was moved to another device"):
            one.ask("save", path=str(tmp_path / "again"))
        front.reset()
        image = tmp_path / "image"
        back = others.front_end()
        Lab(others._stack, back)
        other.ask("save", path=str(image))
        one.ask("load", path=str(image))
        assert (one.ask("status")["moved"], one.ask("status")["held"]) == (False, False)


def test_nobody_elses_user_is_listened_to(tmp_path, monkeypatch):
    with serving(tmp_path) as those:
        with monkeypatch.context() as patch:
            patch.setattr(
                control_server_module, "credentials_of", lambda _: SimpleNamespace(pid=1, uid=os.geteuid() + 1, gid=0)
            )
            with pytest.raises(VdpaBridgeError, match=r"has ended|Broken pipe|reset by peer"):
                those.client().ask("status")
        assert those.client().ask("status")["state"] == "reset"


def test_a_move_to_itself_is_no_move(tmp_path):
    with serving(tmp_path) as those, pytest.raises(UsageError, match="are the same socket"):
        move(those.client(), those.client())


@pytest.mark.parametrize("path", ["relative", "/tmp/\0x", "/tmp/\ud800", 5])
def test_paths_that_are_none(tmp_path, path):
    with serving(tmp_path) as those, pytest.raises(ControlError, match="is not an absolute path"):
        those.client().ask("load", path=path)
