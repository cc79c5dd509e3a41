"""The control socket of ``vdpabridge serve``, and the commands that use it. Each test runs the real commands."""

import json
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress

import pytest

from vdpabridge.cli.exit_codes import exit_code
from vdpabridge.control.client import ControlClient, ControlError
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import VdpaBridgeError

from ..support.mount import Mount
from ..support.waiting import wait_until
from .test_serve import COMMAND, ENVIRONMENT, run, serving


@contextmanager
def controlled(tmp_path, name="a", *options, device="sim:fs"):
    """(vhost-user socket, control socket, process)."""
    path, control = str(tmp_path / name), str(tmp_path / f"{name}.control")
    with serving(device, "--socket-path", path, "--control", control, *options) as process:
        wait_until(lambda: listens(control) or process.poll() is not None)
        yield path, control, process


def listens(path):
    """Whether somebody does; a socket's file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
    return True


@contextmanager
def mounted(tmp_path):
    with (
        controlled(tmp_path) as (path, control, _),
        ExitStack() as stack,
        VhostUser.open(path, device_id=26, timeout_s=10) as device,
    ):
        yield Mount(stack, device), control


def test_status(tmp_path):
    with mounted(tmp_path) as (_, control):
        done = run("-j", "status", control)
        facts = json.loads(done.stdout)
        assert (facts["device"], facts["state"], facts["front_end"]) == ("sim:fs", "running", True)
        assert "DEVICE_STATE" in facts["capabilities"]
        assert facts["queues"]["1"] == {"size": 64, "enabled": True}
        said = run("status", control).stdout.splitlines()
        assert said[:4] == [
            "sim:fs: running, front-end connected",
            "  queue 0       64 descriptors, enabled",
            "  queue 1       64 descriptors, enabled",
            "  features      VERSION_1",
        ]


def test_suspend_and_resume_under_a_front_end(tmp_path):
    """The guest waits, whatever its front-end asks for, and goes on."""
    with mounted(tmp_path) as (mount, control):
        assert run("suspend", control).returncode == 0
        answers = []
        thread = threading.Thread(target=lambda: answers.append(mount.read()))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        mount.device.enable_queue(1, False)
        mount.device.enable_queue(1)
        assert json.loads(run("-j", "status", control).stdout)["state"] == "suspended"
        assert run("resume", control).returncode == 0
        thread.join(10)
        assert answers == [b"These"]


def test_save_and_go_on_elsewhere(tmp_path):
    image = tmp_path / "image"
    with mounted(tmp_path) as (mount, control):
        done = run("-j", "save", control, str(image), "--stay")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["state"] == "suspended"
        status = json.loads(run("-j", "status", control).stdout)
        assert (status["state"], status["held"], status["moved"]) == ("suspended", True, False)
        assert stat.S_IMODE(image.stat().st_mode) == 0o600
        mount.device.suspend()
        bases = [mount.device.get_base(index).avail_index for index in range(2)]
        with (
            controlled(tmp_path, "b", "--restore", str(image)) as (path, _, _),
            VhostUser.open(path, device_id=26, timeout_s=10) as destination,
        ):
            mount.start(destination, bases)
            assert mount.read() == b"These"
    shown = run("-j", "inspect", str(image))
    assert json.loads(shown.stdout)["image"][str(image)]["device"] == "fs"


def test_save_leaves_the_guest_running(tmp_path):
    with mounted(tmp_path) as (mount, control):
        done = run("save", control, str(tmp_path / "image"))
        assert done.returncode == 0, done.stderr
        assert mount.read() == b"These"


def test_save_to_standard_output_and_load_from_standard_input(tmp_path):
    with mounted(tmp_path) as (_, control), controlled(tmp_path, "b") as (_, other, _):
        saved = subprocess.Popen(
            [*COMMAND, "save", control, "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
        loaded = subprocess.run(
            [*COMMAND, "-j", "load", other, "-"],
            stdin=saved.stdout,
            capture_output=True,
            env=ENVIRONMENT,
            timeout=30,
            check=False,
        )
        _, said = saved.communicate(timeout=30)
        assert (saved.returncode, loaded.returncode) == (0, 0), said + loaded.stderr
        assert json.loads(loaded.stdout)["digest"] == json.loads(said)["digest"]


def test_migrate(tmp_path):
    with mounted(tmp_path) as (mount, control), controlled(tmp_path, "b") as (path, other, _):
        picture = tmp_path / "picture.svg"
        done = run("migrate", control, other, "--report", str(picture))
        assert done.returncode == 0, done.stderr
        assert "blackout" in picture.read_text()
        assert json.loads(run("-j", "status", control).stdout)["state"] == "suspended"
        mount.device.suspend()
        bases = [mount.device.get_base(index).avail_index for index in range(2)]
        with VhostUser.open(path, device_id=26, timeout_s=10) as destination:
            mount.start(destination, bases)
            assert mount.read() == b"These"


def test_a_migration_that_fails_leaves_the_source_running(tmp_path):
    with mounted(tmp_path) as (mount, control), controlled(tmp_path, "b", device="sim:blk") as (_, other, _):
        done = run("migrate", control, other)
        assert done.returncode == 1
        assert "device id 26" in done.stderr
        assert mount.read() == b"These"


def test_an_image_that_does_not_fit_at_the_start(tmp_path):
    image = tmp_path / "image"
    with mounted(tmp_path) as (_, control):
        assert run("save", control, str(image)).returncode == 0
    done = run("serve", "sim:blk", "--socket-path", str(tmp_path / "c"), "--restore", str(image))
    assert done.returncode == 1
    assert "device id 26" in done.stderr
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("moment", range(1, 10))
def test_whoever_moves_state_is_killed_at_any_moment(tmp_path, moment):
    """The source resumes, unless it was told that it has moved; only then does the destination start."""
    words = [sys.executable, "-m", "tests.support.mortal", str(moment)]
    with mounted(tmp_path) as (mount, control), controlled(tmp_path, "b") as (_, other, _):
        done = subprocess.run([*words, control, other], env=ENVIRONMENT, timeout=30, check=False)
        assert done.returncode == (0 if moment > 8 else -signal.SIGKILL)
        if moment < 6:
            assert mount.read() == b"These"
        else:
            status = json.loads(run("-j", "status", control).stdout)
            assert (status["state"], status["moved"]) == ("suspended", True)
            there = json.loads(run("-j", "status", other).stdout)
            assert (there["arriving"], there["held"]) == ((False, False) if moment > 7 else (True, True))
            refused = run("resume", control)
            assert refused.returncode == 1
            assert "its state was moved to another device" in refused.stderr
            assert run("resume", "--force", control).returncode == 0
            assert mount.read() == b"These"


def test_a_device_stays_suspended_for_as_long_as_somebody_is_connected(tmp_path):
    with mounted(tmp_path) as (mount, control), open(os.devnull, "wb") as nowhere:
        with ControlClient(control, timeout_s=10) as client, ControlClient(control, timeout_s=10) as other:
            client.ask("save", nowhere.fileno(), stay="connection")
            assert other.ask("status")["state"] == "suspended"
        assert mount.read() == b"These"
        with ControlClient(control, timeout_s=10) as client:
            client.ask("save", nowhere.fileno(), stay="connection")
            client.ask("suspend")
        assert json.loads(run("-j", "status", control).stdout)["held"] is True
        assert run("resume", control).returncode == 0
        assert mount.read() == b"These"


def test_by_path_and_statistics(tmp_path):
    """For whoever cannot send descriptors."""
    image = str(tmp_path / "image")
    with mounted(tmp_path) as (mount, control), controlled(tmp_path, "b") as (_, other, _):
        with ControlClient(control, timeout_s=10) as client, ControlClient(other, timeout_s=10) as there:
            saved = client.ask("save", path=image)
            assert there.ask("load", path=image)["digest"] == saved["digest"]
            for path, why in (
                (f"{image}.not", "No such file"),
                ("image", "not an absolute path"),
                (5, "not an absolute"),
            ):
                with pytest.raises(ControlError, match=why):
                    there.ask("load", path=path)
            with pytest.raises(ControlError, match="stay 'forever'"):
                client.ask("save", path=image, stay="forever")
            facts = client.ask("statistics")
        assert facts["procedures"]["save"]["done"] == 1
        assert facts["procedures"]["save"]["state_bytes"] == saved["state_bytes"]
        assert facts["front_ends"] == 1
        assert facts["messages"] > 10
        assert "  load          1 done, 3 failed, " in run("statistics", other).stdout
        assert mount.read() == b"These"


# --- the protocol ---


def test_the_socket_is_for_its_owner_only(tmp_path):
    with controlled(tmp_path) as (_, control, process):
        assert stat.S_IMODE(os.stat(control).st_mode) == 0o600
        process.terminate()
        process.wait(10)
        assert not os.path.exists(control)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"no json", -32700),
        (b"[1, 2]", -32600),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "status"}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 5}', -32600),
        (b'{"jsonrpc": "2.0", "id": NaN, "method": "status"}', -32700),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "status", "params": {"x": -Infinity}}', -32700),
        (b'{"jsonrpc": "2.0", "id": 1e999, "method": "status"}', -32600),
        (b'{"jsonrpc": "2.0", "id": [1], "method": "status"}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "explode"}', -32601),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "status", "params": [1]}', -32602),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "save"}', -32000),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "load"}', -32000),
    ],
)
def test_errors(tmp_path, line, code):
    with controlled(tmp_path) as (_, control, _), socket.socket(socket.AF_UNIX) as client:
        client.connect(control)
        client.settimeout(10)
        client.sendall(line + b"\n")
        answer = json.loads(client.recv(65536))
        assert answer["jsonrpc"] == "2.0"
        assert answer["error"]["code"] == code
        client.sendall(b'{"jsonrpc": "2.0", "id": 7, "method": "status"}\n')
        assert json.loads(client.recv(65536))["id"] == 7


def test_a_client_that_does_not_read_is_hung_up_on_and_the_others_are_answered(tmp_path):
    with controlled(tmp_path) as (_, control, _), socket.socket(socket.AF_UNIX) as client:
        client.connect(control)
        client.settimeout(30)
        ended = threading.Event()

        def flood():
            asked = b'{"jsonrpc": "2.0", "id": 1, "method": "status"}\n' * 100
            with suppress(OSError):
                while True:
                    client.sendall(asked)
            ended.set()

        thread = threading.Thread(target=flood)
        thread.start()
        with ControlClient(control, timeout_s=2) as other:
            while not ended.is_set():
                assert other.ask("status")["state"] == "reset"
        thread.join()


def test_notifications_get_no_answer_and_halves_of_lines_wait(tmp_path):
    with controlled(tmp_path) as (_, control, _), socket.socket(socket.AF_UNIX) as client:
        client.connect(control)
        client.settimeout(10)
        client.sendall(b'{"jsonrpc": "2.0", "method": "suspend"}\n{"jsonrpc": "2.0", "id": 1, ')
        with ControlClient(control, timeout_s=10) as other:
            assert other.ask("status")["held"] is True
        client.sendall(b'"method": "resume"}\n')
        assert json.loads(client.recv(65536))["id"] == 1


def test_errors_reach_the_one_who_asked(tmp_path):
    refused = pytest.raises(ControlError, match="not while the device is reset")
    with (
        controlled(tmp_path) as (_, control, _),
        ControlClient(control, timeout_s=10) as client,
        open(os.devnull, "wb") as nowhere,
    ):
        with refused as caught:
            client.ask("save", nowhere.fileno())
        assert (caught.value.code, caught.value.device) == (-32000, "sim:fs")


def test_nobody_there(tmp_path):
    with pytest.raises(VdpaBridgeError, match="serve --control"):
        ControlClient(str(tmp_path / "nowhere"))
    assert run("status", str(tmp_path / "nowhere")).returncode == 1


# --- what a script can tell apart ---


def test_a_process_that_does_not_answer_is_a_timeout(tmp_path):
    with controlled(tmp_path) as (_, control, process):
        process.send_signal(signal.SIGSTOP)
        try:
            done = run("status", control, "--timeout", "0.3")
        finally:
            process.send_signal(signal.SIGCONT)
        assert done.returncode == 5
        assert "no answer within 0.3 s (the process that owns the device is stopped, or busy)" in done.stderr


def test_what_the_device_cannot_do_and_what_takes_too_long():
    for kind, code in (("unable", 3), ("timed out", 5), ("", 1)):
        error = ControlError("save", "x", {"code": -32000, "message": "no", "data": {"kind": kind}})
        assert exit_code(error) == code


def test_an_image_is_not_for_a_terminal(tmp_path):
    with controlled(tmp_path) as (_, control, _):
        ours, theirs = os.openpty()
        done = subprocess.run(
            [*COMMAND, "save", control, "-"], stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False
        )
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"an image is not for a terminal" in done.stderr


def test_an_error_names_the_image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"nonsense")
    with controlled(tmp_path) as (_, control, _):
        assert f"{path} into " in run("load", control, str(path)).stderr


def test_a_moved_device_stays_so_for_a_process_that_comes_after(tmp_path):
    """Whoever ends and starts the source again, for example a service manager, does not start its device."""
    with controlled(tmp_path) as (_, control, _server), ControlClient(control, timeout_s=10) as client:
        client.ask("moved", move="m")
    assert os.path.exists(f"{control}.moved")
    with controlled(tmp_path) as (_, control, _server):
        status = json.loads(run("-j", "status", control).stdout)
        assert (status["moved"], status["held"]) == (True, True)
        assert "its state was moved to another device" in run("status", control).stdout
        assert "  move m        moved\n" in run("status", control).stdout
        done = run("resume", control, "--move", "m")
        assert (done.returncode, "move m has taken the state of this device away" in done.stderr) == (1, True)
        assert run("resume", control, "--move", "m", "--force").returncode == 2
        assert run("resume", control, "--force").returncode == 0
    assert not os.path.exists(f"{control}.moved")


def test_a_report_that_cannot_be_written_is_found_before_anything_is_moved(tmp_path):
    with mounted(tmp_path) as (mount, control), controlled(tmp_path, "b") as (_, other, _):
        done = run("migrate", control, other, "--report", "/nowhere/report.svg")
        assert done.returncode == 1
        assert "/nowhere/report.svg" in done.stderr
        assert mount.read() == b"These"


def test_a_report_that_does_not_fit_says_that_the_state_was_moved_all_the_same(tmp_path):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    with mounted(tmp_path) as (_, control), controlled(tmp_path, "b") as (_, other, _):
        picture = tmp_path / "picture.svg"
        done = run("-j", "migrate", control, other, "--report", str(picture), preexec_fn=limited)
        assert (done.returncode, picture.exists()) == (1, False)
        error = json.loads(done.stderr)["error"]
        assert (error["device"], error["why"]) == (str(picture), "File too large")
        assert "the state was moved all the same: start the destination" in error["hint"]


INTERRUPTED = """
import signal, sys
from vdpabridge.cli import remote
from vdpabridge.cli.main import main
from vdpabridge.control import client

if sys.argv[1] == "draw":
    def draw(*_words):
        raise KeyboardInterrupt
    remote.draw = draw
else:
    ask = client.ControlClient.ask
    def interrupted(self, method, *words, **options):
        answer = ask(self, method, *words, **options)
        if method == "moved":
            raise KeyboardInterrupt
        return answer
    client.ControlClient.ask = interrupted
sys.exit(main(["migrate", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("draw", "the state was moved all the same: start the destination"),
        ("moved", "it is not known whether"),
    ],
)
def test_an_interruption_after_the_state_has_gone_says_so(when, said, tmp_path):
    with mounted(tmp_path) as (_, control), controlled(tmp_path, "b") as (_, other, _):
        words = [sys.executable, "-c", INTERRUPTED, when, control, other, "--report", str(tmp_path / "picture")]
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 130
        assert done.stderr.startswith("vdpabridge: interrupted: ")
        assert said in done.stderr


def test_a_migration_that_fails_says_whose_fault_it_was_and_what_runs(tmp_path):
    with mounted(tmp_path) as (_, control), controlled(tmp_path, "b", device="sim:blk") as (_, other, _):
        said = run("migrate", control, other).stderr
        assert said.startswith(f"vdpabridge: {other}: migrate: ")
        assert f"{control} is running; nothing was moved" in said


def test_a_migration_that_fails_is_drawn_too(tmp_path):
    with (
        controlled(tmp_path, "a", device="sim:fs,files=5") as (path, control, _),
        controlled(tmp_path, "b", device="sim:fs,files=1") as (_, other, _),
        ExitStack() as stack,
        VhostUser.open(path, device_id=26, timeout_s=10) as device,
    ):
        mount = Mount(stack, device)
        mount.fuse.open(mount.fuse.walk("many/00004").nodeid)
        picture = tmp_path / "picture.svg"
        done = run("migrate", control, other, "--report", str(picture))
        assert done.returncode == 1
        assert "which is not shared here" in done.stderr
        drawn = picture.read_text()
        assert f"{control} to {other}: failed" in drawn
        assert "suspend" in drawn
        assert "undo: reset the destination" in drawn


def test_save_and_stay_with_a_file_that_cannot_be_written(tmp_path):
    """The image is not there: nobody is to wait for it with a device that stays suspended."""
    with mounted(tmp_path) as (mount, control):
        folder = tmp_path / "gone"
        folder.mkdir()
        words = [sys.executable, "-c", SAVE_INTO_NOWHERE, control, str(folder / "image")]
        done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert done.returncode == 1, done.stderr
        assert json.loads(run("-j", "status", control).stdout)["held"] is False
        assert mount.read() == b"These"


#: Its folder vanishes when the image is written, and before it has its name.
SAVE_INTO_NOWHERE = """
import os, sys
from vdpabridge.cli import main
from vdpabridge.control.client import ControlClient
before = ControlClient.ask
def ask(self, method, *words, **params):
    answer = before(self, method, *words, **params)
    if method == "save":
        os.rmdir(os.path.dirname(sys.argv[2]))
    return answer
ControlClient.ask = ask
sys.exit(main(["save", sys.argv[1], sys.argv[2], "--stay"]))
"""


def test_a_source_that_was_moved_takes_state_again(tmp_path):
    """And runs again, for its front-end, without being forced."""
    with mounted(tmp_path) as (mount, control), controlled(tmp_path, "b") as (_, other, _):
        assert run("migrate", control, other).returncode == 0
        mount.device.reset()
        assert run("migrate", other, control).returncode == 1, "the other has not been set up by anybody"
        with ControlClient(control, timeout_s=10) as client:
            assert client.ask("status")["moved"] is True


@pytest.mark.parametrize("command", ["migrate", "save"])
def test_what_was_done_is_said_although_the_rest_cannot_be(tmp_path, command):
    with mounted(tmp_path) as (_, control), controlled(tmp_path, "b") as (_, other, _), open("/dev/full", "wb") as full:
        image = str(tmp_path / "image")
        words = [control, other] if command == "migrate" else [control, image, "--stay"]
        done = subprocess.run(
            [*COMMAND, command, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, check=False
        )
        assert done.returncode == 1
        said = "the state was moved all the same" if command == "migrate" else f"{image} is written; the device stays"
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_front_end_that_does_not_read_its_replies_does_not_silence_the_control_socket(tmp_path):
    with controlled(tmp_path, device="sim:blk") as (path, control, _), socket.socket(socket.AF_UNIX) as front:
        front.connect(path)
        front.settimeout(30)
        with suppress(OSError):
            while True:
                front.sendall(struct.pack("=III", 1, 1, 0) * 100)
        with ControlClient(control, timeout_s=5) as client:
            assert client.ask("status")["state"] == "reset"
