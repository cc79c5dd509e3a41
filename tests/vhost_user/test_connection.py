"""Messages over a real socket: cut, split, with too much or too little of everything. No descriptor ever leaks."""

import array
import os
import socket
import threading
import time

import pytest

from vdpabridge.abi.vhost_user import HEADER
from vdpabridge.errors import ConnectionLost, DeadlineExceeded, ProtocolError
from vdpabridge.vhost_user.connection import FDS_MAX, Connection, is_listening


@pytest.fixture
def ends():
    """(our end, the peer's bare socket)"""
    ours, theirs = socket.socketpair()
    with Connection(ours, "the peer", timeout_s=2) as connection, theirs:
        yield connection, theirs


@pytest.fixture
def files():
    """A function that opens descriptors, closed afterwards."""
    opened = []

    def make(count):
        new = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
        opened.extend(new)
        return new

    yield make
    for fd in opened:
        os.close(fd)


def raw(request=1, flags=1, payload=b"", size=None):
    return HEADER.pack(request, flags, len(payload) if size is None else size) + payload


def with_fds(theirs, data, fds):
    theirs.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_bytes_on_the_wire(ends):
    connection, theirs = ends
    connection.send(42, b"\1\0\0\0\0\0\0\0", flags=9)
    assert theirs.recv(100).hex(" ", 4) == "2a000000 09000000 08000000 01000000 00000000"


def test_descriptors_arrive_and_are_closed_on_exec(ends, files):
    connection, theirs = ends
    with_fds(theirs, raw(12, payload=bytes(8)), files(2))
    with connection.receive() as message:
        assert (message.request, message.payload, message.fd_count) == (12, bytes(8), 2)
        for fd in message.take_fds():
            assert not os.get_inheritable(fd)
            os.close(fd)


def test_descriptors_that_nobody_takes_are_closed(ends, files):
    connection, theirs = ends
    with_fds(theirs, raw(), files(3))
    with connection.receive() as message:
        assert repr(message) == "<Message 1: flags 0x1, 0 bytes, 3 descriptors>"


def test_descriptors_go_with_the_first_byte(ends, files):
    connection, theirs = ends
    connection.send(5, bytes(100), files(4))
    data, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(64))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    for fd in fds:
        os.close(fd)
    assert (data, len(fds)) == (b"\5", 4)
    assert len(theirs.recv(4096)) == 111


def test_a_message_in_single_bytes(ends):
    connection, theirs = ends
    data = raw(3, payload=b"abcdef")

    def trickle():
        for position in range(len(data)):
            theirs.send(data[position : position + 1])
            time.sleep(0.001)

    thread = threading.Thread(target=trickle)
    thread.start()
    message = connection.receive()
    thread.join()
    assert (message.request, message.payload) == (3, b"abcdef")


def test_two_messages_at_once(ends):
    connection, theirs = ends
    theirs.send(raw(1, payload=b"x") + raw(2, payload=b"y"))
    assert [connection.receive().payload for _ in range(2)] == [b"x", b"y"]


def test_a_large_message_through_a_small_buffer(ends):
    connection, theirs = ends
    connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    received = bytearray()

    def drain():
        while len(received) < 12 + 4096 * 16:
            received.extend(theirs.recv(1000))

    thread = threading.Thread(target=drain)
    thread.start()
    connection.send(44, bytes(range(256)) * 256)
    thread.join()
    assert received[12:] == bytes(range(256)) * 256


def test_the_end_between_messages_is_no_error(ends):
    connection, theirs = ends
    theirs.send(raw())
    theirs.close()
    assert connection.receive() is not None
    assert connection.receive() is None


@pytest.mark.parametrize("cut", [1, 11, 12, 15])
def test_the_end_in_the_middle(ends, files, cut):
    connection, theirs = ends
    with_fds(theirs, raw(payload=bytes(8))[:cut], files(1))
    theirs.close()
    with pytest.raises(ConnectionLost, match="the peer closed the connection"):
        connection.receive()


# (header and payload, what is wrong with it)
BROKEN = [
    (raw(flags=0), "version 0, not 1"),
    (raw(flags=2), "version 2, not 1"),
    (raw(flags=3), "version 3, not 1"),
    (raw(flags=0x11), "unknown flags 0x10"),
    (raw(flags=0x80000001), "unknown flags 0x80000000"),
    (raw(size=4097), "a payload of 4097 bytes"),
    (raw(size=0xFFFFFFFF), "a payload of 4294967295 bytes"),
]


@pytest.mark.parametrize(("data", "why"), BROKEN, ids=[row[1] for row in BROKEN])
def test_what_is_no_message(ends, files, data, why):
    connection, theirs = ends
    with_fds(theirs, data, files(2))
    with pytest.raises(ProtocolError, match=why) as caught:
        connection.receive()
    assert (caught.value.peer, caught.value.request) == ("the peer", 1)


@pytest.mark.parametrize("count", [FDS_MAX + 1, 100, 253])
def test_too_many_descriptors(ends, files, count):
    connection, theirs = ends
    with_fds(theirs, raw(), files(count))
    with pytest.raises(ProtocolError, match=f"more than {FDS_MAX} descriptors"):
        connection.receive()


def test_as_many_descriptors_as_may_be(ends, files):
    connection, theirs = ends
    with_fds(theirs, raw(), files(FDS_MAX))
    with connection.receive() as message:
        assert message.fd_count == FDS_MAX


def test_descriptors_with_the_payload(ends, files):
    """They belong to the first byte of the header; there are none elsewhere, and the kernel keeps nothing of them."""
    connection, theirs = ends
    theirs.send(raw(payload=bytes(8))[:12])
    with_fds(theirs, bytes(8), files(1))
    with connection.receive() as message:
        assert (message.payload, message.fd_count) == (bytes(8), 0)


@pytest.mark.parametrize("begun", [b"", raw()[:5], raw(payload=bytes(8))[:14]])
def test_a_peer_that_stalls(ends, begun):
    connection, theirs = ends
    connection.timeout_s = 0.05
    theirs.send(begun)
    with pytest.raises(DeadlineExceeded, match=r"the peer: receive a message: no answer within 0\.05 s"):
        connection.receive()


def test_a_peer_that_does_not_read(ends):
    connection, _ = ends
    connection.timeout_s = 0.05
    with pytest.raises(DeadlineExceeded, match="send message 7"):
        connection.send(7, bytes(10 << 20))


def test_a_peer_that_is_gone(ends):
    connection, theirs = ends
    theirs.close()
    with pytest.raises(ConnectionLost) as caught:
        connection.send(7)
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.request == 7


def test_connect_waits_for_a_listener(tmp_path):
    path = str(tmp_path / "socket")
    with pytest.raises(ConnectionLost, match="nobody listens there"):
        Connection.connect(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)  # there, and refusing
        threading.Timer(0.1, listener.listen).start()
        with Connection.connect(path, timeout_s=5) as connection:
            assert repr(connection) == f"<Connection to {path}>"


def test_connect_says_what_else_is_wrong(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r".") as caught:
        Connection.connect(str(tmp_path / ("x" * 200)), timeout_s=1)
    assert "too long" in str(caught.value)


def test_listening_and_connected_descriptors_are_told_apart(ends, tmp_path):
    _, theirs = ends
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert not is_listening(listener.fileno())
        listener.listen()
        assert is_listening(listener.fileno())
    assert not is_listening(theirs.fileno())
    with open(os.devnull, "rb") as no_socket, pytest.raises(OSError, match="socket"):
        is_listening(no_socket.fileno())


def test_a_connected_descriptor_is_taken():
    ours, theirs = socket.socketpair()
    with theirs, Connection.from_fd(ours.detach(), timeout_s=1) as connection:
        theirs.send(raw(9))
        assert connection.receive().request == 9


def test_a_descriptor_that_is_no_socket_is_closed():
    with pytest.raises(OSError, match="socket"):
        Connection.from_fd(os.open(os.devnull, os.O_RDONLY))
