"""What systemd tells a service, and is told by it."""

import os
import socket

import pytest

from vdpabridge.linux.systemd import notify, passed_sockets


@pytest.fixture
def passed(monkeypatch):
    def set_up(fds, names=None, pid=None):
        monkeypatch.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
        monkeypatch.setenv("LISTEN_FDS", str(fds))
        if names is not None:
            monkeypatch.setenv("LISTEN_FDNAMES", names)
        monkeypatch.setattr(os, "set_inheritable", lambda fd, value: made.append((fd, value)))
        return made

    made = []
    return set_up


@pytest.mark.parametrize(
    ("fds", "names", "expected"),
    [
        (1, "front-end", {"front-end": 3}),
        (2, "a:b", {"a": 3, "b": 4}),
        (1, None, {"socket 3": 3}),
        (2, "a", {"a": 3, "socket 4": 4}),
        (0, "", {}),
        ("many", "", {}),
        ("\u00b2", "", {}),
    ],
)
def test_sockets(passed, fds, names, expected):
    made = passed(fds, names)
    assert passed_sockets() == expected
    assert made == [(fd, False) for fd in expected.values()], "not for processes that this one starts"
    assert "LISTEN_FDS" not in os.environ
    assert passed_sockets() == {}


def test_sockets_of_another_process(passed):
    passed(1, "front-end", pid=1)
    assert passed_sockets() == {}


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(monkeypatch, tmp_path, abstract):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        name = f"@vdpabridge-test-{os.getpid()}" if abstract else str(tmp_path / "s")
        told.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1")
        assert told.recv(100) == b"READY=1"
        notify("STATUS=\udcff")
        assert told.recv(100) == b"STATUS=\xff", "paths are of any bytes"


def test_nobody_to_notify(monkeypatch, tmp_path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
