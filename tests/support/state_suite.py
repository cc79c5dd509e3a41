"""What device state promises, whatever gives it: the same tests for every transport and every device behind it.

A module that imports these tests has a fixture ``file_server``: a function that opens one more file server, with the
same files each time, and closes it at the test's end.
"""

import errno
import hashlib
import os
import stat
import struct
from contextlib import ExitStack

import pytest

from vdpabridge.device import Capability, RunState, StateDirection
from vdpabridge.errors import FeatureError, StateError, VdpaBridgeError
from vdpabridge.guest.fuse import FuseError
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.procedures import load as load_image, migrate, save
from vdpabridge.state.replay import resume
from vdpabridge.state.transfer.channel import Limits

from .mount import ROOT, Mount
from .state import load, state_of
from .transitions import begin_state, shared_file

__all__ = [
    "test_a_damaged_state_changes_nothing",
    "test_a_load_that_is_abandoned_changes_nothing",
    "test_a_new_transfer_ends_the_one_before",
    "test_a_running_device_gives_no_state",
    "test_a_save_that_is_abandoned_changes_nothing",
    "test_a_state_that_is_cut_changes_nothing",
    "test_a_state_with_something_behind_it_changes_nothing",
    "test_a_transfer_ends_when_the_device_goes_on",
    "test_an_image_keeps_what_the_guest_has_open",
    "test_an_open_file_goes_along",
    "test_descriptors_do_not_stay",
    "test_nothing_to_check",
    "test_state_can_be_saved_again",
    "test_the_guest_reads_what_is_shared",
    "test_what_a_load_brings_is_what_a_save_gives",
    "test_what_is_refused",
    "test_what_was_loaded_is_gone_after_a_reset",
]

#: Big enough to get past a pipe's own buffer.
OPEN_FILES = 300


def limits():
    return Limits(Deadline(60))


def line(number):
    return b"line %05d of the file called lines\n" % number


@pytest.fixture
def at_work(file_server):
    """A `Mount` of a file server, with files looked up and open."""
    with ExitStack() as stack:
        yield busy(Mount(stack, file_server()))


def busy(mount):
    many = mount.fuse.lookup(ROOT, "many").nodeid
    mount.deep = mount.fuse.lookup(many, "00007").nodeid
    mount.fuse.lookup(many, "00007")
    mount.lines = mount.fuse.lookup(ROOT, "lines").nodeid
    mount.open_lines = mount.fuse.open(mount.lines)
    mount.many = many
    mount.open_many = mount.fuse.opendir(many)
    mount.names = mount.fuse.readdir(many, mount.open_many)
    assert [next(mount.names) for _ in range(3)] == [".", "..", "00000"]
    return mount


def check_what_is_open(mount):
    """Old handles read the right bytes, and what the guest forgets is forgotten: nothing is counted twice."""
    fuse = mount.fuse
    assert fuse.read(mount.nodeid, mount.handle, 0, 5) == b"These"
    assert fuse.read(mount.lines, mount.open_lines, 36 * 1999, 100) == line(1999)
    assert fuse.lookup(mount.many, "00007").nodeid == mount.deep
    fuse.forget(mount.deep, 2)
    assert fuse.getattr(mount.deep).size_bytes == 15
    fuse.forget(mount.deep)
    with pytest.raises(FuseError) as caught:
        fuse.getattr(mount.deep)
    assert caught.value.errno == errno.ESTALE
    assert list(mount.names) == [f"{number:05}" for number in range(1, 10)]
    fuse.release(mount.lines, mount.open_lines)
    with pytest.raises(FuseError) as caught:
        fuse.read(mount.lines, mount.open_lines, 0, 1)
    assert caught.value.errno == errno.EBADF
    assert fuse.open(mount.lines) > mount.open_many, "no handle is given out twice"


# --- the file server itself ---


def test_the_guest_reads_what_is_shared(at_work):
    fuse = at_work.fuse
    lines = b"".join(map(line, range(2000)))
    assert fuse.getattr(at_work.lines).size_bytes == len(lines)
    whole = b"".join(fuse.read(at_work.lines, at_work.open_lines, at, 5000) for at in range(0, len(lines), 5000))
    assert whole == lines
    assert fuse.read(at_work.lines, at_work.open_lines, 7, 1 << 17) == lines[7:]
    assert fuse.read(at_work.lines, at_work.open_lines, len(lines), 10) == b""
    root = fuse.opendir(ROOT)
    assert list(fuse.readdir(ROOT, root)) == [".", "..", "README", "lines", "many"]
    assert [fuse.getattr(nodeid).mode for nodeid in (ROOT, at_work.many, at_work.lines)] == [
        stat.S_IFDIR | 0o555,
        stat.S_IFDIR | 0o555,
        stat.S_IFREG | 0o444,
    ]


REFUSED = {
    "a name that is not there": (lambda mount: mount.fuse.lookup(ROOT, "nothing"), errno.ENOENT),
    "a name below a file": (lambda mount: mount.fuse.lookup(mount.lines, "x"), errno.ENOENT),
    "a name that is a path": (lambda mount: mount.fuse.lookup(ROOT, "many/00001"), errno.EINVAL),
    "no name": (lambda mount: mount.fuse.lookup(ROOT, ""), errno.EINVAL),
    "almost a name": (lambda mount: mount.fuse.lookup(mount.many, "0001\n"), errno.ENOENT),
    "another spelling": (lambda mount: mount.fuse.lookup(mount.many, "1"), errno.ENOENT),
    "an inode that was not looked up": (lambda mount: mount.fuse.getattr(77), errno.ESTALE),
    "inode 0": (lambda mount: mount.fuse.getattr(0), errno.ESTALE),
    "writing": (lambda mount: mount.fuse.open(mount.lines, os.O_RDWR), errno.EROFS),
    "a directory as a file": (lambda mount: mount.fuse.open(mount.many), errno.EISDIR),
    "a file as a directory": (lambda mount: mount.fuse.opendir(mount.lines), errno.ENOTDIR),
    "a handle that is not open": (lambda mount: mount.fuse.release(mount.lines, 1 << 40), errno.EBADF),
    "a directory's handle": (lambda mount: mount.fuse.read(mount.many, mount.open_many, 0, 10), errno.EBADF),
    "a file's handle": (lambda mount: list(mount.fuse.readdir(mount.lines, mount.open_lines)), errno.EBADF),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(at_work, name):
    act, code = REFUSED[name]
    with pytest.raises(FuseError) as caught:
        act(at_work)
    assert caught.value.errno == code
    assert at_work.read() == b"These"


# --- from one device to another ---


def test_an_open_file_goes_along(at_work, file_server):
    destination = file_server()
    destination.map([at_work.memory.region])
    migrate(at_work.device, destination, limits())
    assert (at_work.device.state, destination.state) == (RunState.RESET, RunState.RUNNING)
    check_what_is_open(at_work)


def test_an_image_keeps_what_the_guest_has_open(at_work, file_server):
    destination = file_server()
    destination.map([at_work.memory.region])
    with shared_file(0) as file:
        report = save(at_work.device, file, limits(), stay_suspended=True)
        assert report.state_bytes > 0
        os.lseek(file, 0, os.SEEK_SET)
        assert load_image(destination, file, limits(), at_work.eventfds).digest == report.digest
    check_what_is_open(at_work)


def test_what_a_load_brings_is_what_a_save_gives(at_work, file_server):
    for _ in range(OPEN_FILES):
        at_work.fuse.open(at_work.lines)
    at_work.device.suspend()
    state = state_of(at_work.device)
    other = file_server()
    load(other, state)
    assert sorted_records(state_of(other)) == sorted_records(state)


def test_what_was_loaded_is_gone_after_a_reset(at_work, file_server):
    fresh = state_of(file_server())
    at_work.device.suspend()
    state = state_of(at_work.device)
    assert state != fresh
    at_work.device.reset()
    assert state_of(at_work.device) == fresh
    load(at_work.device, state)
    at_work.device.reset()
    assert state_of(at_work.device) == fresh


# --- saving ---


def test_state_can_be_saved_again(at_work):
    """SAVE harms nothing: the source resumes after a migration that failed."""
    at_work.device.suspend()
    first = state_of(at_work.device)
    assert [state_of(at_work.device) for _ in range(3)] == [first] * 3
    resume(at_work.device)
    check_what_is_open(at_work)


def test_a_running_device_gives_no_state(at_work):
    for direction in StateDirection:
        with pytest.raises(StateError):
            begin_state(at_work.device, direction)
    with pytest.raises(StateError):
        at_work.device.check_state()
    check_what_is_open(at_work)


def test_a_save_that_is_abandoned_changes_nothing(at_work):
    at_work.device.suspend()
    state = state_of(at_work.device)
    with begin_state(at_work.device, StateDirection.SAVE) as file:
        assert file.read(10) == state[:10]
    at_work.device.abandon_state()
    assert state_of(at_work.device) == state
    resume(at_work.device)
    check_what_is_open(at_work)


# --- loading: all or nothing ---


def refused(device, state):
    """``device`` refuses ``state``, and is as it was. Wherever the refusal comes: at the write or at the check."""
    before = state_of(device)
    with pytest.raises((VdpaBridgeError, OSError)) as caught:
        load(device, state)
    assert not isinstance(caught.value, (StateError, FeatureError))
    device.abandon_state()
    assert state_of(device) == before


@pytest.fixture
def saved(at_work):
    """A state with something in it. The source goes on."""
    at_work.device.suspend()
    state = state_of(at_work.device)
    resume(at_work.device)
    return state


def test_a_damaged_state_changes_nothing(saved, file_server):
    device = file_server()
    for at in range(len(saved)):
        refused(device, saved[:at] + bytes([saved[at] ^ 0x40]) + saved[at + 1 :])
    load(device, saved)


def test_a_state_that_is_cut_changes_nothing(saved, file_server):
    device = file_server()
    for size in range(len(saved)):
        refused(device, saved[:size])
    load(device, saved)


def test_a_state_with_something_behind_it_changes_nothing(saved, file_server):
    device = file_server()
    for more in (b"\0", saved, bytes(100_000)):
        refused(device, saved + more)
    load(device, saved)


def test_a_load_that_is_abandoned_changes_nothing(saved, file_server):
    device = file_server()
    fresh = state_of(device)
    for part in (b"", saved[:10], saved[:-1]):
        with begin_state(device, StateDirection.LOAD) as file:
            file.write(part)
        device.abandon_state()
        assert state_of(device) == fresh
    load(device, saved)


def test_a_new_transfer_ends_the_one_before(saved, file_server):
    device = file_server()
    fresh = state_of(device)
    with begin_state(device, StateDirection.LOAD) as first:
        first.write(saved[:20])
    with begin_state(device, StateDirection.SAVE) as second:
        assert second.read() == fresh
    device.check_state()
    load(device, saved)
    assert sorted_records(state_of(device)) == sorted_records(saved)


GO_ON = {
    "reset": lambda device: device.reset(),
    "resume": resume,
}


@pytest.mark.parametrize("how", GO_ON)
def test_a_transfer_ends_when_the_device_goes_on(at_work, how):
    """Resume and reset end a transfer that nobody has checked."""
    device = at_work.device
    device.suspend()
    begin_state(device, StateDirection.SAVE).close()
    GO_ON[how](device)
    if how == "resume":
        device.suspend()
    with pytest.raises(VdpaBridgeError):
        device.check_state()
    assert state_of(device)


def test_nothing_to_check(file_server):
    device = file_server()
    assert Capability.DEVICE_STATE in device.capabilities
    with pytest.raises(VdpaBridgeError):
        device.check_state()
    device.abandon_state()
    assert state_of(device)


def test_descriptors_do_not_stay(saved, file_server):
    device = file_server()

    def rounds():
        for _ in range(5):
            state_of(device)
            load(device, saved)
            begin_state(device, StateDirection.LOAD).close()
            device.abandon_state()
            begin_state(device, StateDirection.SAVE).close()
            device.reset()

    rounds()
    before = len(os.listdir("/proc/self/fd"))
    rounds()
    assert len(os.listdir("/proc/self/fd")) == before


# --- the form of a file server's state, which both simulators have ---

_HEAD = struct.Struct("<8sII")
_LENGTH = struct.Struct("<I")
_COUNTS = struct.Struct("<IIQQII")
_INODE = struct.Struct("<QQH")
_HANDLE = struct.Struct("<QQB")


def records_of(state):
    """(what comes first, inodes, handles) of a state; AssertionError if it is not one."""
    digest = hashlib.sha256(state[:-32]).digest()
    assert state[-32:] == digest
    magic, version, device_id = _HEAD.unpack_from(state)
    assert (magic, version, device_id) == (b"vdpa-sim", 2, 26)
    at, content, counts = _HEAD.size, b"", None
    while length := _LENGTH.unpack_from(state, at)[0]:
        chunk = state[at + 4 : at + 4 + length]
        counts, content = (chunk, content) if counts is None else (counts, content + chunk)
        at += 4 + length
    assert at + 4 == len(state) - 32
    minor, flags, next_nodeid, next_handle, inode_count, handle_count = _COUNTS.unpack(counts)
    at, inodes = 0, []
    for _ in range(inode_count):
        nodeid, lookups, length = _INODE.unpack_from(content, at)
        at += _INODE.size + length
        inodes.append((nodeid, lookups, content[at - length : at]))
    handles = list(_HANDLE.iter_unpack(content[at:]))
    assert len(handles) == handle_count
    return (minor, flags, next_nodeid, next_handle), inodes, handles


def sorted_records(state):
    """The same, in an order that does not depend on who has written it."""
    head, inodes, handles = records_of(state)
    return head, sorted(inodes), sorted(handles)
