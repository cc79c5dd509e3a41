"""Whether the process at the other end has ended: known only where the kernel knows it."""

import os
import signal
import socket
from contextlib import contextmanager

import pytest

from vdpabridge.export.vhost_user.server import listen
from vdpabridge.vhost_user.peer import PeerProcess


@contextmanager
def process(path, *, forks=False):
    """One that listens at ``path`` and takes one connection, or has its child do it; the number of who does."""
    reader, writer = os.pipe()
    if (first := os.fork()) == 0:
        with listen(path) as listener:
            if forks and os.fork():
                os._exit(0)
            os.write(writer, str(os.getpid()).encode())
            os.close(writer)
            connection = listener.accept()[0]
            connection.recv(1)
            if forks:
                connection.close()
            signal.pause()
    os.close(writer)
    with open(reader, encoding="ascii") as said:
        number = int(said.read())
    if forks:
        os.waitpid(first, 0)
    try:
        yield number
    finally:
        os.kill(number, signal.SIGKILL)
        if not forks:
            os.waitpid(first, 0)


@contextmanager
def connected(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        peer = PeerProcess(connection.fileno())
        try:
            yield peer
        finally:
            peer.close()


def test_one_that_is_killed(tmp_path):
    path = str(tmp_path / "s")
    with process(path) as number, connected(path) as peer:
        assert not peer.hang_up(0.05)
        os.kill(number, signal.SIGKILL)
        assert peer.hang_up(10)


def test_one_that_had_its_child_serve(tmp_path):
    """It ended long ago; the child, which the kernel does not tell us of, has closed its end and works on."""
    path = str(tmp_path / "s")
    with process(path, forks=True), connected(path) as peer:
        assert not peer.hang_up(0.2)


@pytest.mark.parametrize("closed", [False, True])
def test_this_process(closed):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = PeerProcess(ours.fileno())
        if closed:
            theirs.close()
        assert not peer.hang_up(0.05)
        peer.close()
