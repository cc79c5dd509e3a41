"""What a server says: it never waits for a reader, and nobody can make it say more than somebody can read."""

import fcntl
import os
import re

import pytest

from vdpabridge.cli import log as log_module
from vdpabridge.cli.log import Log

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}"


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(writer)
    os.close(reader)


def said(reader):
    """Level and text of each line."""
    try:
        lines = os.read(reader, 1 << 20).decode().splitlines()
    except BlockingIOError:
        return []
    found = [re.fullmatch(rf"vdpabridge: {TIME} (\w+): (.*)", line) for line in lines]
    assert all(found), lines
    return [each.groups() for each in found]


def test_lines_have_a_time_and_a_level(pipe):
    reader, writer = pipe
    log = Log(writer)
    log.info("served")
    log.warning("odd")
    log.say("error", "bad")
    log.say("debug", "too much")
    assert said(reader) == [("info", "served"), ("warning", "odd"), ("error", "bad")]


@pytest.mark.parametrize(
    ("level", "expected"),
    [("error", 1), ("warning", 2), ("info", 3), ("debug", 4)],
)
def test_only_what_is_urgent_enough(pipe, level, expected):
    reader, writer = pipe
    log = Log(writer, level)
    for each in ("debug", "info", "warning", "error"):
        log.say(each, "text")
    assert len(said(reader)) == expected


def test_journald_is_told_the_level_in_its_own_way(pipe, monkeypatch):
    reader, writer = pipe
    status = os.fstat(writer)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    log = Log(writer)
    log.info("served")
    log.say("error", "bad")
    log.trace("message")
    assert os.read(reader, 1000) == b"<6>served\n<3>bad\n<7>message\n"


def test_what_is_left_out_is_counted(pipe, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now_s[0])
    reader, writer = pipe
    log = Log(writer)
    for number in range(1000):
        log.info(f"report {number}")
    assert said(reader) == [("info", f"report {number}") for number in range(50)]
    now_s[0] += 1
    log.info("later")
    assert said(reader) == [("warning", "lines that were left out: 950"), ("info", "later")]
    log.info("too much")
    log.info("too much")
    log.close()
    log.close()
    assert said(reader) == [("info", "too much"), ("warning", "lines that were left out: 1")]


def test_a_trace_is_not_limited(pipe):
    reader, writer = pipe
    log = Log(writer, "error")
    for _ in range(200):
        log.trace("one")
    assert len(said(reader)) == 200


def test_a_reader_that_does_not_read_is_not_waited_for(monkeypatch):
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(reader, False)
    log = Log(writer)
    log.trace("x" * 10_000)
    log.trace("lost")
    assert len(os.read(reader, 1 << 20)) == 4096
    # the count is told as soon as there is room, and after it what is to be said; a page has room for one of them
    log.trace("heard")
    assert said(reader) == [("warning", "lines that were left out: 1")]
    log.trace("heard")
    assert said(reader) == [("warning", "lines that were left out: 1")]
    os.close(reader)
    log.trace("nobody is there")
    os.close(writer)
