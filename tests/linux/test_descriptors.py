"""What descriptors are, and closing those of others without waiting for anybody."""

import os
import socket
import struct
import threading
import time

import pytest

from vdpabridge.drivers.sim.model import StateRefused
from vdpabridge.drivers.sim.transfer import Transfer
from vdpabridge.linux import descriptors
from vdpabridge.linux.descriptors import Kind, discard, hang_up, kind_of, same_socket

from ..support.waiting import wait_until


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


def in_queue(fd):
    """A UNIX socket in whose queue ``fd`` lies, which is taken."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])
    os.close(fd)
    return theirs


@pytest.mark.parametrize("wrapped", [0, 1, 2], ids=["itself", "in the queue of a UNIX socket", "in that of another"])
def test_a_socket_that_lingers_keeps_nobody(wrapped):
    """Not this thread, nor those that close: there are more of them than threads."""
    peers = []
    for _ in range(descriptors._CLOSERS._THREADS_MAX + 4):
        fd, peer = lingering()
        for _ in range(wrapped):
            fd = in_queue(fd).detach()
        discard([fd])
        peers.append(peer)
    wait_until(lambda: not descriptors._CLOSERS._threads)
    for peer in peers:
        peer.close()


def test_a_connection_in_whose_queue_one_lies_is_closed_at_once():
    fd, peer = lingering()
    thread = threading.Thread(target=hang_up, args=[in_queue(fd)])
    thread.start()
    wait_until(lambda: not thread.is_alive() and not descriptors._CLOSERS._threads)
    peer.close()


@pytest.mark.parametrize(
    ("type_name", "kind"),
    [("ext4", Kind.FILE), ("fuse.sshfs", Kind.SERVED_FILE), ("nfs4", Kind.SERVED_FILE), ("", Kind.FILE)],
)
def test_a_file_that_somebody_else_serves(type_name, kind, tmp_path, monkeypatch):
    """One that is mounted elsewhere for others is known by its device."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(descriptors, "_file_system", lambda _fd: type_name)
    with open(tmp_path / "file", "rb") as file:
        assert kind_of(file.fileno()) is kind


@pytest.mark.parametrize(
    ("device", "mounts", "kind"),
    [
        (os.makedev(253, 1), [], Kind.FILE),
        (os.makedev(0, 77), [], Kind.SERVED_FILE),
        (os.makedev(0, 77), [("9", "0:77", "overlay")], Kind.FILE),
        (os.makedev(0, 77), [("9", "0:77", "fuse.sshfs")], Kind.SERVED_FILE),
    ],
    ids=["a disk", "nobody knows", "mounted here too", "served here too"],
)
def test_a_file_that_is_mounted_for_others_only(device, mounts, kind, monkeypatch):
    monkeypatch.setattr(descriptors, "_file_system", lambda _fd: "")
    monkeypatch.setattr(descriptors, "_mounts", lambda: mounts)
    monkeypatch.setattr(descriptors, "_asked", lambda _fd: os.stat_result((0o100644, 0, device, *[0] * 7)))
    fd = os.open(__file__, os.O_RDONLY)
    assert kind_of(fd) is kind
    os.close(fd)


def test_who_serves_a_file_is_not_asked_for_longer_than_a_moment(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    go_on = threading.Event()
    monkeypatch.setattr(descriptors, "_file_system", lambda _fd: "")
    monkeypatch.setattr(descriptors, "_ASK_S", 0.01)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    threads = threading.active_count()
    with monkeypatch.context() as patched:
        patched.setattr(descriptors.os, "fstat", lambda _fd: go_on.wait(10))
        for _ in range(20):
            assert kind_of(fd) is Kind.SERVED_FILE
    assert threading.active_count() <= threads + descriptors._UNANSWERED_MAX
    go_on.set()
    wait_until(lambda: not descriptors._UNANSWERED)
    os.close(fd)


@pytest.mark.parametrize("kind", ["datagrams", "sequence of packets", "listens"])
def test_other_sockets_in_whose_queue_one_lies(kind):
    """Behind an empty message, or in the queue of somebody who waits to be let in."""
    fd, peer = lingering()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
    if kind == "listens":
        theirs = socket.socket(socket.AF_UNIX)
        theirs.bind(f"\0vdpabridge-test-{os.getpid()}")
        theirs.listen()
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(theirs.getsockname())
    else:
        types = {"datagrams": socket.SOCK_DGRAM, "sequence of packets": socket.SOCK_SEQPACKET}
        ours, theirs = socket.socketpair(socket.AF_UNIX, types[kind])
        ours.send(b"")
    ours.sendmsg([b"x"], rights)
    os.close(fd)
    ours.close()
    discard([theirs.detach()])
    wait_until(lambda: not descriptors._CLOSERS._threads)
    peer.close()


def test_file_systems_are_known_by_their_mounts():
    for path, type_name in (("/proc/self/stat", "proc"), ("/sys/kernel", "sysfs")):
        fd = os.open(path, os.O_RDONLY)
        assert descriptors._file_system(fd) == type_name
        os.close(fd)


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
