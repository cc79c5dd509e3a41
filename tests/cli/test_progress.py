"""The line that says how far a transfer is: true at any moment, also while nothing moves, and gone afterwards."""

import io
import json
import os
import pty
import subprocess
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from vdpabridge.abi.vhost_user import FrontendRequest
from vdpabridge.abi.vhost_user_payloads import U64
from vdpabridge.cli import progress as progress_module
from vdpabridge.cli.progress import ProgressLine
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.export.vhost_user.server import listen
from vdpabridge.vhost_user.connection import Connection

from ..support.scripted import VIRTIOFSD, ScriptedBackEnd
from ..support.waiting import wait_until
from .test_control import controlled
from .test_serve import COMMAND, ENVIRONMENT

PIECES = 16


@pytest.fixture
def terminal(monkeypatch):
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    # not sys.stderr itself: pytest puts its own there for each phase of a test
    monkeypatch.setattr(progress_module, "sys", SimpleNamespace(stderr=stderr))
    monkeypatch.setattr(progress_module, "_INTERVAL_S", 0.01)
    return stderr


def test_nobody_is_told_of_what_is_soon_over(terminal):
    with ProgressLine("save") as progress:
        progress(10_000_000)
    assert terminal.getvalue() == ""


def test_nothing_is_said_where_nobody_watches(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(progress_module, "sys", SimpleNamespace(stderr=stderr))
    monkeypatch.setattr(progress_module, "_PATIENCE_S", 0)
    with ProgressLine("save") as progress:
        progress(10_000_000)
    assert stderr.getvalue() == ""


def test_it_is_shown_and_wiped_away(terminal, monkeypatch):
    monkeypatch.setattr(progress_module, "_PATIENCE_S", 0)
    with ProgressLine("save") as progress:
        progress(10_000_000)
        wait_until(lambda: "save: 10.0 MB in " in terminal.getvalue())
    text = terminal.getvalue()
    assert "MB/s" in text or "kB/s" in text or "GB/s" in text
    assert text.endswith(" \r")
    assert len(text.split("\r")[-2].strip()) == 0


def test_it_says_for_how_long_nothing_has_moved(terminal, monkeypatch):
    monkeypatch.setattr(progress_module, "_PATIENCE_S", 0)
    monkeypatch.setattr(progress_module, "_STALLED_S", 0.05)
    with ProgressLine("migrate") as progress:
        progress(1234)
        wait_until(lambda: "migrate: 1.2 kB in " in terminal.getvalue())
        wait_until(lambda: ", nothing has moved for " in terminal.getvalue())
        progress(99_000)
        wait_until(lambda: "99.0 kB" in terminal.getvalue())


def test_a_terminal_that_is_gone_is_no_reason_to_fail(terminal, monkeypatch):
    monkeypatch.setattr(progress_module, "_PATIENCE_S", 0)

    def gone(_text):
        raise OSError(5, "Input/output error")

    terminal.write = gone
    with ProgressLine("save") as progress:
        progress(1)
        assert progress._ended.wait(10)


# --- with a device whose state takes its time ---


@contextmanager
def pseudo_terminal():
    """(our end, the program's end)."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


@contextmanager
def slow_back_end(path):
    """A back-end at ``path`` whose state takes its time."""
    with listen(path) as listener:

        def pour(fd):
            with open(fd, "wb", buffering=0) as sink:
                for _ in range(PIECES):
                    sink.write(bytes(1 << 20))
                    time.sleep(0.1)

        def give(message):
            thread = threading.Thread(target=pour, args=message.take_fds())
            threads.append(thread)
            thread.start()
            return [(FrontendRequest.SET_DEVICE_STATE_FD, 5, U64(0x100).pack(), ())]

        def serve():
            back_end = ScriptedBackEnd(Connection(listener.accept()[0], "the test"), VIRTIOFSD, 1 << 32 | 1 << 30)
            back_end.answers[FrontendRequest.SET_DEVICE_STATE_FD] = give
            back_end.run()

        threads = [threading.Thread(target=serve)]
        threads[0].start()
        try:
            yield
        finally:
            for thread in threads:
                thread.join()


def test_a_save_that_lasts(tmp_path):
    lower, image = str(tmp_path / "lower"), str(tmp_path / "image")
    with (
        slow_back_end(lower),
        controlled(tmp_path, "a", device=f"vhost-user:{lower},id=fs") as (path, control, _),
        VhostUser.open(path, device_id=26, timeout_s=10) as front_end,
        pseudo_terminal() as (ours, theirs),
    ):
        front_end.accept_features(1 << 32)
        done = subprocess.run(
            [*COMMAND, "-j", "save", control, image],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=ENVIRONMENT,
            timeout=30,
            check=True,
        )
        assert json.loads(done.stdout)["state_bytes"] == PIECES << 20
        assert b"\rsave: " in os.read(ours, 10000)
