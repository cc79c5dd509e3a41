"""What descriptors are, and closing those of others without waiting for anybody."""

import os
import socket
import struct
import threading
import time

import pytest

from vdpabridge import descriptors
from vdpabridge.descriptors import Kind, discard, kind_of, same_socket
from vdpabridge.drivers.sim.model import StateRefused
from vdpabridge.drivers.sim.transfer import Transfer

from .support.waiting import wait_until


def test_kinds(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made = {
        os.eventfd(0): Kind.EVENTFD,
        os.memfd_create("memory"): Kind.FILE,
        os.open(tmp_path / "file", os.O_RDONLY): Kind.FILE,
        os.open(tmp_path / "fifo", os.O_RDWR): Kind.PIPE,
        reader: Kind.PIPE,
        writer: Kind.PIPE,
        ours.detach(): Kind.UNIX_SOCKET,
        theirs.detach(): Kind.UNIX_SOCKET,
        udp.detach(): Kind.OTHER,
        os.open("/dev/null", os.O_RDWR): Kind.DEVICE,
        os.open("/", os.O_RDONLY): Kind.OTHER,
        os.pidfd_open(os.getpid()): Kind.OTHER,
    }
    assert {fd: kind_of(fd) for fd in made} == made
    discard(made)
    wait_until(lambda: not descriptors._CLOSERS._threads)
    for fd in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            kind_of(fd)


def test_a_file_that_is_called_like_an_eventfd(tmp_path):
    path = tmp_path / "anon_inode:[eventfd]"
    path.write_bytes(b"")
    fd = os.open(path, os.O_RDWR)
    assert kind_of(fd) is Kind.FILE
    os.close(fd)


def test_the_same_socket():
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.dup() as duplicate:
        assert same_socket(ours.fileno(), duplicate.fileno())
        assert not same_socket(ours.fileno(), theirs.fileno())


def lingering():
    """A TCP socket whose close waits: data is on its way that nobody takes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 10))
    connection.setblocking(False)
    for size in (1 << 16, 4096, 1):
        try:
            while True:
                connection.send(bytes(size))
        except BlockingIOError:
            continue
    return connection.detach(), peer


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "in the queue of a UNIX socket"])
def test_a_socket_that_lingers_keeps_nobody(wrapped):
    fd, peer = lingering()
    if wrapped:
        ours, theirs = socket.socketpair()
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])
        os.close(fd)
        ours.close()
        fd = theirs.detach()
    discard([fd])
    assert descriptors._CLOSERS._threads == 1, "a thread waits, and this one does not"
    peer.close()
    wait_until(lambda: not descriptors._CLOSERS._threads)


def test_many_at_once_and_no_more_threads_than_allowed(monkeypatch):
    """What there is no thread for waits its turn; nothing is lost."""
    closed = []
    go_on = threading.Event()

    def close(fd):
        go_on.wait(10)
        closed.append(fd)
        real(fd)

    real = os.close
    sockets = [each.detach() for _ in range(20) for each in socket.socketpair()]
    monkeypatch.setattr(descriptors.os, "close", close)
    discard(sockets)
    assert descriptors._CLOSERS._threads == descriptors._CLOSERS._THREADS_MAX
    go_on.set()
    wait_until(lambda: len(closed) == 40 and not descriptors._CLOSERS._threads)


def test_closing_raises_nothing(monkeypatch):
    """EIO of a file server does not end the thread that closes for all."""
    ours, theirs = socket.socketpair()
    fds = [ours.detach(), theirs.detach()]
    seen = []

    def close(fd):
        real(fd)
        seen.append(fd)
        raise OSError(5, "Input/output error")

    real = os.close
    monkeypatch.setattr(descriptors.os, "close", close)
    discard([*fds, 99999])
    wait_until(lambda: len(seen) == 2 and not descriptors._CLOSERS._threads)
    monkeypatch.undo()
    time.sleep(0)


def test_without_a_thread_the_next_one_closes(monkeypatch):
    class NoThread:
        def __init__(self, **_):
            raise RuntimeError("can't start new thread")

    ours, theirs = socket.socketpair()
    with monkeypatch.context() as patch:
        patch.setattr(descriptors.threading, "Thread", NoThread)
        discard([ours.detach()])
    assert descriptors._CLOSERS._waiting
    discard([theirs.detach()])
    wait_until(lambda: not descriptors._CLOSERS._waiting and not descriptors._CLOSERS._threads)


def test_the_name_of_a_thing_is_not_the_thing(tmp_path):
    """O_PATH: nothing can be done with it, and to find that out leaves nothing open (see conftest)."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        for path in (tmp_path / "s", tmp_path):
            fd = os.open(path, os.O_PATH)
            assert kind_of(fd) is Kind.OTHER
            with pytest.raises(StateRefused, match="Bad file descriptor"):
                Transfer(fd, lambda _: None)
