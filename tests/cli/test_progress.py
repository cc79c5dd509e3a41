"""The line that says how far a transfer is: on a terminal only, and only for what takes long."""

import io
import json
import os
import pty
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from vdpabridge.abi.vhost_user import FrontendRequest
from vdpabridge.abi.vhost_user_payloads import U64
from vdpabridge.cli.progress import ProgressLine
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.export.vhost_user.server import listen
from vdpabridge.vhost_user.connection import Connection

from ..support.scripted import VIRTIOFSD, ScriptedBackEnd
from .test_control import controlled
from .test_serve import COMMAND, ENVIRONMENT

PIECES = 16


@contextmanager
def terminal():
    """(our end, the program's end)."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(("took_s", "shown"), [(0.5, False), (3.0, True)])
def test_only_what_lasts_is_shown(monkeypatch, took_s, shown):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", stderr)
    with ProgressLine("save") as progress:
        clock[0] = took_s
        progress(600_000_000)
    text = stderr.getvalue()
    assert ("save: 600 MB in 3 s, 200 MB/s" in text) is shown
    assert text.endswith("\r") is shown, "and is wiped away"


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
        terminal() as (ours, theirs),
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
