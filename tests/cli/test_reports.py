"""What a server says: it never waits for a reader, and nobody can make it say more than somebody can read."""

import fcntl
import os

from vdpabridge.cli import reports
from vdpabridge.cli.reports import Reports


def said(reader):
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1 << 20).decode().splitlines()
    except BlockingIOError:
        return []


def test_what_is_left_out_is_counted(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(reports.time, "monotonic", lambda: now_s[0])
    reader, writer = os.pipe()
    say = Reports(writer)
    for number in range(1000):
        say(f"report {number}")
    assert said(reader) == [f"vdpabridge: report {number}" for number in range(50)]
    now_s[0] += 1
    say("later")
    assert said(reader) == ["vdpabridge: reports that were left out: 950", "vdpabridge: later"]
    say("too much")
    say("too much")
    say.close()
    say.close()
    assert said(reader) == ["vdpabridge: too much", "vdpabridge: reports that were left out: 1"]
    os.close(reader)
    os.close(writer)


def test_a_trace_is_not_limited():
    reader, writer = os.pipe()
    say = Reports(writer)
    for _ in range(200):
        say.trace("one")
    assert len(said(reader)) == 200
    os.close(reader)
    os.close(writer)


def test_a_reader_that_does_not_read_is_not_waited_for():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    say = Reports(writer)
    say.trace("x" * 10_000)
    say.trace("lost")
    assert [len(line) for line in said(reader)] == [4095]
    say.trace("heard")
    assert said(reader) == ["vdpabridge: reports that were left out: 1"]
    say.trace("heard")
    assert said(reader) == ["vdpabridge: reports that were left out: 1"]
    os.close(reader)
    say.trace("nobody is there")
    os.close(writer)
