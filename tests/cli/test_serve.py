"""``vdpabridge serve``: the conventions of back-end programs, and bad input. Each test runs the real command."""

import errno
import fcntl
import grp
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vdpabridge.cli.files import DESCRIPTORS
from vdpabridge.cli.main import _parse
from vdpabridge.control.client import ControlClient
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.export.vhost_user.server import listen
from vdpabridge.vhost_user.connection import Connection

from ..support.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "vdpabridge"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*words, **options):
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=30, env=ENVIRONMENT, check=False, **options
    )


@contextmanager
def serving(*words, **options):
    """A server; ended by SIGTERM, with which it must end well."""
    process = subprocess.Popen(
        [*COMMAND, "serve", *words], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=10)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "s")


def is_served(path):
    """Whether somebody listens there; the file is there a moment before. Asked so that it is not taken for a front-end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
    return False


def connect(path):
    return VhostUser.open(path, timeout_s=10)


# --- conventions ---


def test_a_socket_path(path):
    with serving("sim:fs", "--socket-path", path) as server:
        with connect(path) as device:
            assert device.identity.queue_count == 2
        with connect(path) as device:
            assert device.identity.queue_count == 2, "one after the other"
        server.terminate()
        _, said = server.communicate(timeout=10)
        assert server.returncode == 0
        assert [re.sub(r"^vdpabridge: \S+ |\d+$", "", line) for line in said.splitlines()] == [
            f"info: sim:fs is served at {path}",
            "info: front-end came: process ",
            "info: front-end left",
            "info: front-end came: process ",
            "info: front-end left",
        ]
        assert not os.path.exists(path)


def test_once(path):
    with serving("sim:fs", "--socket-path", path, "--once") as server:
        connect(path).close()
        assert server.wait(10) == 0


def test_a_descriptor_that_listens(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with serving("sim:fs", "--fd", str(listener.fileno()), pass_fds=[listener.fileno()]):
            for _ in range(2):
                connect(path).close()


def test_a_descriptor_that_is_connected():
    ours, theirs = socket.socketpair()
    with theirs, serving("sim:blk", "--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()]) as server:
        with VhostUser(Connection(ours, "server", timeout_s=10)) as device:
            assert device.identity.queue_count == 1
        assert server.wait(10) == 0, "its front-end has left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_at_once_also_with_a_front_end(path, number):
    with serving("sim:fs", "--socket-path", path) as server, connect(path):
        server.send_signal(number)
        server.communicate(timeout=10)
        assert server.returncode == 0
        assert not os.path.exists(path)


def test_a_second_front_end_is_sent_away_and_the_first_is_not_disturbed(path):
    with serving("sim:fs", "--socket-path", path) as server, connect(path) as first:
        with socket.socket(socket.AF_UNIX) as second:
            second.connect(path)
            second.settimeout(10)
            assert second.recv(1) == b""
        first.accept_features(1 << 32)
        server.terminate()
        _, said = server.communicate(timeout=10)
        assert "a second front-end was sent away" in said


def test_a_front_end_that_talks_nonsense_is_reported_and_the_next_is_served(path):
    with serving("sim:fs", "--socket-path", path) as server:
        wait_until(lambda: os.path.exists(path))
        with socket.socket(socket.AF_UNIX) as mad:
            connect(path).close()
            mad.connect(path)
            mad.sendall(b"GET / HTTP/1.1\r\n\r\n")
            mad.settimeout(10)
            with suppress(ConnectionResetError):  # what it has not read of us
                assert mad.recv(1) == b""
        connect(path).close()
        server.terminate()
        _, said = server.communicate(timeout=10)
        assert "the front-end: message 542393671: version 3, not 1" in said


def test_tracing(path):
    with serving("sim:fs", "--socket-path", path, "--trace") as server:
        connect(path).close()
        server.terminate()
        _, said = server.communicate(timeout=10)
        assert re.search(
            r" debug: \d+\.\d{9} GET_FEATURES -> 0x[0-9a-f]+ \[.*VERSION_1.* PROTOCOL_FEATURES\] \(\d+ ns\)\n", said
        ), said
        assert re.search(r" GET_PROTOCOL_FEATURES -> 0x[0-9a-f]+ \[.*DEVICE_STATE.*\] \(", said)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("sim:blk", {"type": "block", "features": []}),
        ("sim:fs", {"type": "fs", "features": ["migrate-precopy"]}),
        ("vhost-user:/nowhere,id=fs", {"type": "fs", "features": ["migrate-precopy"]}),
        ("vhost-user:/nowhere,id=1", {"type": "net", "features": []}),
    ],
)
def test_print_capabilities_does_nothing_else(device, expected, path):
    done = run("serve", device, "--print-capabilities", "--socket-path", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == expected
    assert not os.path.exists(path)


PROGRAM = "import sys; from vdpabridge.cli import backend_programs; sys.exit(backend_programs.{}())"


@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_the_descriptors_for_management_software_describe_what_there_is(kind):
    done = subprocess.run(
        [*COMMAND, "descriptor", kind, "--binary", f"/usr/bin/vdpabridge-vhost-user-{kind}"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    facts = json.loads(done.stdout)
    assert set(facts) == {"description", "type", "binary"}
    assert facts["binary"] == f"/usr/bin/vdpabridge-vhost-user-{kind}"
    # alone, and with whatever else it was called
    for more in ([], ["--socket-path", "/nowhere/s"], ["--fd", "99", "--read-only"] if kind == "blk" else ["--xattr"]):
        asked = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(kind), "--print-capabilities", *more],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            check=True,
        )
        assert json.loads(asked.stdout)["type"] == facts["type"]


def test_a_descriptor_without_a_program(tmp_path):
    done = run("descriptor", "fs", cwd=tmp_path) if shutil.which("vdpabridge-vhost-user-fs") is None else None
    if done is not None:
        assert done.returncode == 2
        assert "--binary PATH" in done.stderr


# --- places ---


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_who_may_connect(path):
    group = grp.getgrgid(os.getegid()).gr_name
    with serving("sim:fs", "--socket-path", path, "--socket-mode", "640", "--socket-group", group):
        wait_until(lambda: is_served(path) and mode_of(path) != 0o600)
        assert (mode_of(path), os.stat(path).st_gid) == (0o640, os.getegid())
    with serving("sim:fs", "--socket-path", path, "--socket-group", group):
        wait_until(lambda: is_served(path) and mode_of(path) != 0o600)
        assert mode_of(path) == 0o660
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--socket-mode", "999"], "'999' is not a mode in octal"),
        (["--socket-mode", "1777"], "'1777' is not a mode in octal"),
        (["--socket-group", "no-such-group"], "there is no group 'no-such-group'"),
    ],
)
def test_who_may_not_be_let_in(path, words, why):
    assert why in refused("sim:fs", "--socket-path", path, *words, code=2)
    assert not os.path.exists(path)


def test_a_socket_that_is_passed_is_not_ours_to_open_up():
    assert "are for a socket that is made here" in refused("sim:fs", "--fd", "5", "--socket-mode", "600", code=2)


def passed(*names):
    """Run ``serve`` as systemd does: with sockets from number 3 on, their names, and a socket to be told of."""
    return (
        "import os, sys\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        f"os.environ['LISTEN_FDS'] = '{len(names)}'\n"
        f"os.environ['LISTEN_FDNAMES'] = {':'.join(names)!r}\n"
        "from vdpabridge.cli import main\n"
        "sys.exit(main(['serve', 'sim:fs', '--fd', 'systemd']))\n"
    )


@pytest.mark.parametrize("names", [("front-end",), ("anything",)])
def test_a_socket_of_systemd(path, tmp_path, names):
    notified = str(tmp_path / "notify")
    with listen(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(notified)
        told.settimeout(10)

        def place():
            os.dup2(listener.fileno(), 3)

        process = subprocess.Popen(
            [sys.executable, "-c", passed(*names)],
            preexec_fn=place,
            pass_fds=[3],
            env={**ENVIRONMENT, "NOTIFY_SOCKET": notified},
            stderr=subprocess.DEVNULL,
        )
        with process:
            assert told.recv(1000).startswith(b"READY=1\nSTATUS=sim:fs is served at descriptor 3")
            with connect(path) as device:
                assert device.identity.queue_count == 2
            process.terminate()
            assert told.recv(1000) == b"STOPPING=1"
            assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("names", "why"), [((), "none was passed"), (("a", "b"), "2 sockets, none of them called front-end")]
)
def test_no_socket_of_systemd(names, why):
    with open(os.devnull, "rb") as nothing:

        def place():
            for number in range(len(names)):
                os.dup2(nothing.fileno(), 3 + number)

        done = subprocess.run(
            [sys.executable, "-c", passed(*names)],
            preexec_fn=place,
            pass_fds=range(3, 3 + len(names)),
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            check=False,
        )
    assert (done.returncode, why in done.stderr) == (2, True), done.stderr


def test_service_files_call_what_there_is():
    unit = run("service-file", "service").stdout
    begin = "ExecStart=/usr/bin/vdpabridge "
    words = next(line for line in unit.splitlines() if line.startswith(begin)).removeprefix(begin)
    parsed = _parse(words.replace("${DEVICE}", "sim:fs").replace(" $OPTIONS", "").replace("%i", "x").split())
    assert (parsed.device, parsed.control) == ("sim:fs", "/run/vdpabridge/x.control")
    socket_unit = run("service-file", "socket").stdout
    assert "ListenStream=/run/vdpabridge/%i.sock" in socket_unit
    assert "FileDescriptorName=front-end" in socket_unit
    for other in ("sysusers", "tmpfiles"):
        assert "vdpabridge" in run("service-file", other).stdout
    assert json.loads(run("-j", "service-file", "socket").stdout)["socket"] == socket_unit


# --- bad input ---


def refused(*words, code=1, **options):
    done = run("serve", *words, **options)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("vdpabridge: ") or code == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_somebody_listens_there_already(path):
    with serving("sim:fs", "--socket-path", path), connect(path) as device:
        assert "another process listens there" in refused("sim:fs", "--socket-path", path)
        device.accept_features(1 << 32)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert "another process listens there" in refused("sim:fs", "--socket-path", path)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_socket_file_that_was_left_behind_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(path)
    with serving("sim:fs", "--socket-path", path):
        connect(path).close()


def test_something_else_is_there(path):
    Path(path).write_text("mine")
    assert "something that is not a socket is there" in refused("sim:fs", "--socket-path", path)
    assert Path(path).read_text() == "mine"


def test_a_path_that_is_too_long(tmp_path):
    said = refused("sim:fs", "--socket-path", str(tmp_path / ("x" * 100)))
    assert "107 bytes at most" in said


def test_a_directory_that_is_not_there():
    assert "No such file or directory" in refused("sim:fs", "--socket-path", "/nowhere/at/all")


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("nonsense", "that is not the name of a device"),
        ("sim:tape", "there is no simulated 'tape'"),
        ("sim:blk,colour=red", "no option 'colour'"),
        ("sim:blk,size=much", "size=much is not a number"),
        ("sim:blk,size=0", "size is at least 512"),
        ("sim:blk,size=-512", "size is at least 512"),
        ("sim:blk,size=1000", "a multiple of 512 bytes"),
        ("sim:blk,queues=0", "queues is at least 1 and at most 256"),
        ("sim:blk,queues=99999", "queues is at least 1 and at most 256"),
        ("sim:fs,files=-3", "files is at least 0"),
        ("vhost-user:x,config-size=257", "config-size is at least 1 and at most 256"),
        ("vhost-user:x,queues=0", "queues is at least 1"),
        ("vhost-user:x,id=0", "id is at least 1"),
    ],
)
def test_names_that_are_none(device, why, path):
    assert why in refused(device, "--socket-path", path, code=2)
    assert why in refused(device, "--print-capabilities", code=2)


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("sim:blk,file=/nowhere", "No such file or directory"),
        ("sim:fs,tag=" + "x" * 40, "36 bytes"),
        ("/dev/null", "/dev/null"),
        ("/dev/vhost-vdpa-99", "/dev/vhost-vdpa-99"),
        ("vhost-user:/nowhere/at/all", "nobody listens there"),
    ],
)
def test_devices_that_are_none(device, why, path):
    assert why in refused(device, "--socket-path", path, "--timeout", "0.2")
    assert not os.path.exists(path)


def test_a_descriptor_that_is_no_socket():
    assert "it is not a socket" in refused("sim:fs", "--fd", "0", stdin=subprocess.DEVNULL)
    assert "Bad file descriptor" in refused("sim:fs", "--fd", "99")


def test_nowhere():
    assert "--socket-path PATH or --fd N" in refused("sim:fs", code=2)


def test_both_places():
    refused("sim:fs", "--fd", "3", "--socket-path", "x", code=2)


def test_errors_as_json(path):
    done = run("-j", "serve", "nonsense", "--socket-path", path)
    assert json.loads(done.stderr)["error"]["why"] == "that is not the name of a device"


def test_a_disk_that_may_not_be_read(path, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    assert "Is a directory" in refused(f"sim:blk,file={disk}", "--socket-path", path)


# --- the demonstration ---


def test_the_demonstration():
    done = run("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("demo: PASS\n")
    assert "refused by CHECK_DEVICE_STATE" in done.stdout


# --- what a front-end cannot do to it ---


@pytest.mark.parametrize("limit", range(9, 16))
def test_descriptors_that_run_out_do_not_end_it(path, limit):
    """From a number with which it cannot begin, to one with which everything works; never a traceback."""
    with serving("sim:blk,size=1M", "--socket-path", path, preexec_fn=lambda: set_limit(limit)) as server:
        with suppress(OSError):
            wait_until(lambda: os.path.exists(path) or server.poll() is not None)
            for _ in range(3):
                with socket.socket(socket.AF_UNIX) as front:
                    front.settimeout(5)
                    front.connect(path)
                    front.sendall(struct.pack("=III", 1, 1, 0))
                    front.recv(100)
        ended_by_itself = server.poll()
        server.terminate()
        _, said = server.communicate(timeout=10)
        assert "Traceback" not in said
        if ended_by_itself is None:
            assert server.returncode == 0
        else:
            assert re.search(r"Too many open files|No module|cannot", said), said


def set_limit(limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def test_reports_that_nobody_reads_do_not_stop_it(path):
    """A front-end that is refused a thousand times, with a pipe as standard error that nobody reads."""
    with serving("sim:blk,size=1M", "--socket-path", path, "--trace") as server:
        wait_until(lambda: is_served(path))
        fcntl.fcntl(server.stderr.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        with socket.socket(socket.AF_UNIX) as front:
            front.settimeout(5)
            front.connect(path)
            front.sendall(struct.pack("=III", 16, 1, 8) + struct.pack("=Q", 1 << 3))  # REPLY_ACK
            for _ in range(1000):
                front.sendall(struct.pack("=III", 8, 9, 8) + struct.pack("=II", 200, 64))
                assert front.recv(100)[12:] == struct.pack("=Q", 1)


def test_half_a_message_does_not_silence_the_control_socket(path, tmp_path):
    control = str(tmp_path / "c")
    with serving("sim:blk,size=1M", "--socket-path", path, "--control", control, "--timeout", "2") as server:
        wait_until(lambda: is_served(control))
        with socket.socket(socket.AF_UNIX) as front, ControlClient(control, timeout_s=1) as client:
            front.settimeout(5)
            front.connect(path)
            wait_until(lambda: client.ask("status")["front_end"])
            front.sendall(struct.pack("=III", 8, 9, 8) + struct.pack("=I", 0))
            assert client.ask("status")["front_end"]
            # and the half is not waited for for ever
            assert front.recv(100) == b""
            wait_until(lambda: not client.ask("status")["front_end"])
        server.terminate()
        assert "no answer within 2 s" in server.communicate(timeout=10)[1]
