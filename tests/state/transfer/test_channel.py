"""Bytes from any kind of descriptor to any other, whole, within limits."""

import errno
import os
import socket
import threading
from contextlib import ExitStack

import pytest

from vdpabridge.errors import DeadlineExceeded
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.transfer import channel
from vdpabridge.state.transfer.channel import (
    READ_AND_WRITE,
    Cancelled,
    ChannelError,
    Limits,
    copy,
    enlarge,
    read_some,
    write_all,
)
from vdpabridge.state.transfer.stream import reading

DATA = bytes(range(256)) * 12345
KINDS = ["pipe", "socket", "file"]
#: What the kernel does it with, where it is not splice. A socket that blocks would keep us waiting.
WAYS = {
    ("file", "file"): "copy_file_range",
    ("pipe", "socket"): READ_AND_WRITE,
    ("file", "socket"): READ_AND_WRITE,
    ("socket", "socket"): READ_AND_WRITE,
    ("socket", "file"): READ_AND_WRITE,
}


def limits(**options):
    return Limits(Deadline(options.pop("timeout_s", 10)), **options)


def pair(kind, stack, tmp_path, name):
    """(reading end, writing end) of a channel; of a file, the same at two positions."""
    if kind == "pipe":
        ends = os.pipe()
    elif kind == "socket":
        ends = [each.detach() for each in socket.socketpair()]
    else:
        path = tmp_path / name
        writer = os.open(path, os.O_RDWR | os.O_CREAT)
        ends = [os.open(path, os.O_RDONLY), writer]
    return list(ends)


def fill(fd):
    write_all(fd, DATA, limits())
    os.close(fd)


def drain(fd, into):
    while came := os.read(fd, 1 << 20):
        into.append(came)
    os.close(fd)


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", ["as the kernel can", "by hand"])
def test_every_kind_to_every_kind(kind, to, ways, tmp_path, monkeypatch):
    if ways == "by hand":
        monkeypatch.setattr(channel, "_methods", lambda source, sink: [])
    with ExitStack() as stack:
        source, source_writer = pair(kind, stack, tmp_path, "source")
        sink_reader, sink = pair(to, stack, tmp_path, "sink")
        received = []
        filler = threading.Thread(target=fill, args=[source_writer])
        filler.start()
        if kind == "file":
            filler.join()
        drainer = threading.Thread(target=drain, args=[sink_reader, received])
        if to != "file":
            drainer.start()
        copied = copy(source, sink, limits())
        assert copied == (len(DATA), READ_AND_WRITE if ways == "by hand" else WAYS.get((kind, to), "splice"))
        os.close(sink)
        if to == "file":
            drainer.start()
        filler.join()
        drainer.join()
        os.close(source)
        assert b"".join(received) == DATA


def test_a_way_that_the_kernel_does_not_have(tmp_path, monkeypatch):
    """Then the next is taken: file systems differ in what they can copy between."""

    def refuse(*_words):
        raise OSError(errno.EXDEV, "not between these two")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with ExitStack() as stack:
        source, writer = pair("file", stack, tmp_path, "source")
        fill(writer)
        reader, sink = pair("file", stack, tmp_path, "sink")
        assert copy(source, sink, limits()) == (len(DATA), "sendfile")
        for fd in (source, reader, sink):
            os.close(fd)
    assert (tmp_path / "sink").read_bytes() == DATA


def test_too_much():
    reader, writer = os.pipe()
    os.write(writer, b"x" * 100)
    os.close(writer)
    with open(os.devnull, "wb") as nowhere, pytest.raises(ChannelError, match="more than 99 bytes"):
        copy(reader, nowhere.fileno(), limits(size_bytes=99))
    os.close(reader)


def test_nothing_comes():
    reader, writer = os.pipe()
    with open(os.devnull, "wb") as nowhere, pytest.raises(DeadlineExceeded, match=r"not done within 0\.05 s"):
        copy(reader, nowhere.fileno(), limits(timeout_s=0.05))
    with pytest.raises(DeadlineExceeded):
        read_some(reader, memoryview(bytearray(10)), limits(timeout_s=0.05))
    os.close(writer)
    os.close(reader)


def test_nobody_takes_it_by_hand(tmp_path):
    """A deadline is a deadline, also where the bytes pass through this process."""
    path = tmp_path / "source"
    path.write_bytes(DATA)
    ours, theirs = socket.socketpair()
    with path.open("rb") as file, ours, theirs, pytest.raises(DeadlineExceeded, match="not done within"):
        copy(file.fileno(), ours.fileno(), limits(timeout_s=0.1))


def named(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    return reader, os.open(path, os.O_WRONLY)


SINKS = {
    "pipe": lambda _: os.pipe(),
    "named pipe": named,
    "socket": lambda _: [each.detach() for each in socket.socketpair()],
}


@pytest.fixture(params=["RWF_NOWAIT", "no RWF_NOWAIT"])
def kernel(request, monkeypatch):
    """Before Linux 6.4 there was none for pipes."""

    def refuse(*_words):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if request.param != "RWF_NOWAIT":
        monkeypatch.setattr(os, "pwritev", refuse)


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.usefixtures("kernel")
def test_nobody_takes_it(kind, tmp_path):
    reader, writer = SINKS[kind](tmp_path)
    with pytest.raises(DeadlineExceeded):
        write_all(writer, bytes(1 << 20), limits(timeout_s=0.05))
    assert os.get_blocking(writer), "as its other owners have it"
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.usefixtures("kernel")
def test_what_is_written_arrives(kind, tmp_path):
    reader, writer = SINKS[kind](tmp_path)
    os.set_blocking(reader, True)
    received = []
    drainer = threading.Thread(target=drain, args=[reader, received])
    drainer.start()
    write_all(writer, DATA, limits())
    os.close(writer)
    drainer.join()
    assert b"".join(received) == DATA


def test_somebody_cancels():
    reader, writer = os.pipe()
    event = os.eventfd(1)
    with open(os.devnull, "wb") as nowhere, pytest.raises(Cancelled):
        copy(reader, nowhere.fileno(), limits(cancel_fd=event))
    for fd in (reader, writer, event):
        os.close(fd)


def test_pipes_are_enlarged_and_nothing_else():
    import fcntl

    reader, writer = os.pipe()
    enlarge(writer)
    assert fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ) == 1 << 20
    enlarge(reader)
    with open(os.devnull, "wb") as nowhere:
        enlarge(nowhere.fileno())
    os.close(reader)
    os.close(writer)


def test_an_image_with_much_beside_its_state_is_not_read_to_its_end():
    """A writer could send parts that nobody knows for ever; what is read is bounded with the state."""
    with open("/dev/zero", "rb") as endless:
        read = reading(endless.fileno(), limits(size_bytes=1 << 20))
        with pytest.raises(ChannelError, match="more than 1048576 bytes came"):
            [read(1 << 20) for _ in range(100)]
