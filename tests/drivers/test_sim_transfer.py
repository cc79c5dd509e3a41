"""State through descriptors whose other end means harm, or has stopped caring."""

import fcntl
import os
import socket
import threading

import pytest

from vdpabridge.drivers.sim.model import Loaded, StateRefused
from vdpabridge.drivers.sim.transfer import Transfer


def piped(size_bytes=4096):
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, size_bytes)
    return reader, writer


def test_a_peer_that_makes_its_pipe_wait_again_keeps_no_thread():
    reader, writer = piped()
    transfer = Transfer(os.dup(writer), lambda it: it.write(iter([bytes(1 << 20)])))
    try:
        os.read(reader, 1)
        fcntl.fcntl(writer, fcntl.F_SETFL, fcntl.fcntl(writer, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        os.read(reader, 1)
        assert os.get_blocking(writer)
        transfer.close()
        assert not transfer._thread.is_alive()
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("nonblocking", [True, False])
def test_the_mode_of_the_peers_descriptor_stays_its_own(nonblocking):
    reader, writer = piped()
    os.set_blocking(writer, not nonblocking)
    transfer = Transfer(os.dup(writer), lambda it: it.write(iter([b"state"])))
    transfer.finish(5)
    transfer.close()
    assert os.get_blocking(writer) is not nonblocking
    os.close(writer)
    assert os.read(reader, 10) == b"state"
    os.close(reader)


def test_a_socket_is_written_and_read_without_waiting():
    ours, theirs = socket.socketpair()
    with ours:
        transfer = Transfer(theirs.detach(), lambda it: it.write(iter([bytes(1 << 22)])))
        came = ours.recv(1)
        transfer.close()
        assert not transfer._thread.is_alive()
        while piece := ours.recv(1 << 20):
            came += piece
        assert 0 < len(came) < 1 << 22


def test_a_pipe_that_nobody_reads_any_more():
    reader, writer = piped()
    os.close(reader)
    transfer = Transfer(writer, lambda it: it.write(iter([b"state"])))
    with pytest.raises(StateRefused, match="Broken pipe"):
        transfer.finish(5)
    transfer.close()


def test_a_named_pipe_that_nobody_reads_any_more(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "pipe", os.O_WRONLY)
    os.close(reader)
    with pytest.raises(StateRefused, match="its descriptor: No such device or address"):
        Transfer(writer, lambda it: it.write(iter([b"state"])))


def test_what_a_load_brings_after_it_was_given_up_is_dropped():
    going, gone = threading.Event(), threading.Event()
    fates = []

    def work(_transfer):
        going.set()
        gone.wait(10)
        return Loaded(lambda: fates.append("committed"), lambda: fates.append("discarded"))

    reader, writer = piped()
    transfer = Transfer(reader, work)
    going.wait(10)
    closer = threading.Thread(target=transfer.close)
    closer.start()
    while not transfer._given_up:
        pass
    assert fates == []
    gone.set()
    closer.join(10)
    assert fates == ["discarded"]
    os.close(writer)


def test_what_a_load_has_brought_is_dropped_when_it_is_given_up():
    fates = []
    reader, writer = piped()
    transfer = Transfer(reader, lambda _: Loaded(lambda: fates.append("committed"), lambda: fates.append("discarded")))
    transfer._thread.join(10)
    transfer.close()
    transfer.close()
    assert fates == ["discarded"]
    os.close(writer)
