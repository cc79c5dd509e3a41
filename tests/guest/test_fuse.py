"""FUSE requests on a ring, against the simulated file system: the driver's side and the server's side at once."""

import errno
import os
import stat
import struct
from contextlib import contextmanager

import pytest

from vdpabridge.abi.fuse import FUSE_IN_HEADER, FuseOpcode
from vdpabridge.device import RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.sim.fuse_server import FuseServer
from vdpabridge.drivers.sim.tree import default_tree
from vdpabridge.errors import VdpaBridgeError
from vdpabridge.guest.fuse import FuseDriver, FuseError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..support.state import load, pump, state_of

VERSION_1 = 1 << 32
ROOT = 1


@contextmanager
def ready(file_count=10):
    """(device, driver, start) of a file system that was set up, with ``start(device)`` for another to go on."""
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 64) as hiprio,
        SplitQueue(memory, 64) as requests,
        Sim.fs(default_tree(file_count), timeout_s=5) as device,
    ):

        def start(each, bases=(0, 0)):
            each.map([memory.region])
            each.accept_features(VERSION_1)
            hiprio.attach(each, 0, bases[0])
            requests.attach(each, 1, bases[1])
            each.start()

        start(device)
        yield device, FuseDriver(memory, hiprio, requests, timeout_s=5), start


def test_files():
    with ready() as (device, fuse, _):
        assert fuse.init() == 31
        entry = fuse.walk("many/00007")
        assert (entry.size_bytes, stat.S_ISREG(entry.mode)) == (15, True)
        assert fuse.getattr(entry.nodeid) == entry
        handle = fuse.open(entry.nodeid)
        assert fuse.read(entry.nodeid, handle, 0, 4096) == b"this is file 7\n"
        assert fuse.read(entry.nodeid, handle, 13, 4096) == b"7\n"
        assert fuse.read(entry.nodeid, handle, 100, 4096) == b""
        fuse.release(entry.nodeid, handle)
        with pytest.raises(FuseError, match="EBADF"):
            fuse.read(entry.nodeid, handle, 0, 1)
        assert device.state is RunState.RUNNING


def test_directories():
    with ready(file_count=300) as (_, fuse, _start):
        fuse.init()
        many = fuse.lookup(ROOT, "many").nodeid
        handle = fuse.opendir(many)
        assert list(fuse.readdir(many, handle)) == [".", "..", *(f"{number:05}" for number in range(300))]
        fuse.release(many, handle, directory=True)


REFUSALS = {
    "a name that is not there": (lambda fuse: fuse.lookup(ROOT, "nothing"), errno.ENOENT),
    "an inode that was not looked up": (lambda fuse: fuse.getattr(77), errno.ESTALE),
    "a file opened for writing": (lambda fuse: fuse.open(fuse.lookup(ROOT, "README").nodeid, os.O_RDWR), errno.EROFS),
    "a directory opened as a file": (lambda fuse: fuse.open(ROOT), errno.EISDIR),
    "a file opened as a directory": (lambda fuse: fuse.opendir(fuse.lookup(ROOT, "README").nodeid), errno.ENOTDIR),
    "a name that is a path": (lambda fuse: fuse.lookup(ROOT, "many/00001"), errno.EINVAL),
    "no name": (lambda fuse: fuse.lookup(ROOT, ""), errno.EINVAL),
    "a name below a file": (lambda fuse: fuse.lookup(fuse.lookup(ROOT, "README").nodeid, "x"), errno.ENOENT),
    "a handle that is closed": (lambda fuse: fuse.release(ROOT, 5), errno.EBADF),
    "a file's handle read as a directory": (
        lambda fuse: list(fuse.readdir(ROOT, fuse.open(fuse.lookup(ROOT, "README").nodeid))),
        errno.EBADF,
    ),
    "a change": (lambda fuse: fuse._ask(FuseOpcode.FUSE_MKDIR, ROOT, b"12345678x\0", 128), errno.EROFS),
    "what it has never heard of": (lambda fuse: fuse._ask(FuseOpcode.FUSE_POLL, ROOT, bytes(24), 16), errno.ENOSYS),
    "a request that is cut": (lambda fuse: fuse._ask(FuseOpcode.FUSE_READ, ROOT, bytes(8), 16), errno.EINVAL),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    act, code = REFUSALS[name]
    with ready() as (_, fuse, _start):
        fuse.init()
        with pytest.raises(FuseError) as caught:
            act(fuse)
        assert caught.value.errno == code


def test_nothing_before_init():
    with ready() as (_, fuse, _start), pytest.raises(FuseError, match="EIO"):
        fuse.lookup(ROOT, "README")


def test_forgetting():
    with ready() as (device, fuse, _):
        fuse.init()
        first = fuse.lookup(ROOT, "README").nodeid
        assert fuse.lookup(ROOT, "README").nodeid == first
        fuse.forget(first)
        assert fuse.getattr(first)
        fuse.forget(first)
        with pytest.raises(FuseError, match="ESTALE"):
            fuse.getattr(first)
        fuse.forget(ROOT)
        assert fuse.lookup(ROOT, "README").nodeid != first
        assert set(device.model.session.inodes) == {ROOT, first + 1}


def test_batch_forget():
    server = FuseServer(default_tree())
    ask(server, FuseOpcode.FUSE_INIT, 0, struct.pack("=IIII", 7, 31, 0, 0))
    numbers = [server_lookup(server, name) for name in (b"README", b"lines", b"many")]
    body = struct.pack("=II", 2, 0) + b"".join(struct.pack("=QQ", number, 1) for number in numbers[:2])
    assert ask(server, FuseOpcode.FUSE_BATCH_FORGET, 0, body) is None
    assert set(server.session.inodes) == {ROOT, numbers[2]}


def server_lookup(server, name):
    return struct.unpack_from("=Q", ask(server, FuseOpcode.FUSE_LOOKUP, ROOT, name + b"\0"), 16)[0]


def ask(server, opcode, nodeid, body):
    return server.answer(FUSE_IN_HEADER.pack(40 + len(body), opcode, 1, nodeid, 0, 0, 0, 0, 0) + body)


def test_old_handles_read_the_right_data_in_another_device():
    with ready() as (source, fuse, start), Sim.fs(timeout_s=5) as destination:
        fuse.init()
        nodeid = fuse.lookup(ROOT, "lines").nodeid
        handle = fuse.open(nodeid)
        directory = fuse.opendir(ROOT)
        first = fuse.read(nodeid, handle, 0, 36)
        source.suspend()
        pump(source, destination)
        start(destination, [source.get_base(index).avail_index for index in (0, 1)])
        assert fuse.read(nodeid, handle, 36, 36) == first.replace(b"00000", b"00001")
        assert "README" in list(fuse.readdir(ROOT, directory))
        assert fuse.lookup(ROOT, "lines").nodeid == nodeid
        fuse.release(nodeid, handle)
        assert fuse.open(nodeid) > directory, "no handle is given out twice"


def test_a_new_session_forgets_the_old_one():
    with ready() as (device, fuse, _):
        fuse.init()
        fuse.open(fuse.lookup(ROOT, "README").nodeid)
        fuse.init()
        assert (len(device.model.session.inodes), device.model.session.handles) == (1, {})


def test_state_that_names_files_which_are_not_shared_here():
    with ready(file_count=20) as (source, fuse, _), Sim.fs(default_tree(10), timeout_s=5) as destination:
        fuse.init()
        fuse.walk("many/00015")
        source.suspend()
        with pytest.raises(VdpaBridgeError, match="many/00015"):
            load(destination, state_of(source))


def test_the_tag_is_in_the_configuration_space():
    with Sim.fs(tag="share") as tagged, Sim.fs() as untagged:
        assert tagged.read_config() == b"share".ljust(36, b"\0") + struct.pack("<I", 1)
        assert untagged.identity.config_size_bytes == 0


def test_a_file_that_is_open_is_known_although_it_was_forgotten():
    """FORGET has a queue of its own and may come first; what is open is part of the state all the same."""
    with ready() as (device, fuse, _), Sim.fs(timeout_s=5) as other:
        fuse.init()
        nodeid = fuse.lookup(ROOT, "README").nodeid
        handle = fuse.open(nodeid)
        fuse.forget(nodeid)
        assert fuse.read(nodeid, handle, 0, 5) == b"These"
        device.suspend()
        pump(device, other)
        device.resume()
        fuse.release(nodeid, handle)
        assert set(device.model.session.inodes) == {ROOT}


def test_versions_of_the_protocol():
    server = FuseServer(default_tree())
    newer = ask(server, FuseOpcode.FUSE_INIT, 0, struct.pack("=IIII", 8, 0, 0, 0))
    assert struct.unpack("=iQII", newer[4:24]) == (0, 1, 7, 31), "the driver asks again, with this one"
    assert server.session.minor == 0
    older = ask(server, FuseOpcode.FUSE_INIT, 0, struct.pack("=IIII", 7, 12, 0, 0))
    assert struct.unpack("=i", older[4:8]) == (-errno.EPROTO,)


def test_forgetting_an_inode_does_not_look_at_every_open_file():
    class Unsearched(dict):
        def __iter__(self):
            raise AssertionError("all handles were looked at")

        values = items = keys = __iter__

    server = FuseServer(default_tree())
    ask(server, FuseOpcode.FUSE_INIT, 0, struct.pack("=IIII", 7, 31, 0, 0))
    known, open_ = (server_lookup(server, name) for name in (b"README", b"lines"))
    server.session.handles = Unsearched()
    ask(server, FuseOpcode.FUSE_OPEN, open_, struct.pack("=II", 0, 0))
    for nodeid in (known, open_):
        ask(server, FuseOpcode.FUSE_FORGET, nodeid, struct.pack("=Q", 1))
    assert set(server.session.inodes) == {ROOT, open_}
