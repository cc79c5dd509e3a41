"""A file server's session as device state: what goes in comes out, and what is not one is refused."""

import struct

import pytest
from hypothesis import given, strategies as st

from vdpabridge.drivers.sim.fs import FsModel
from vdpabridge.drivers.sim.fuse_session import KNOWN_MAX, FuseSession, Handle, Inode, pack_session, unpack_session
from vdpabridge.drivers.sim.model import StateRefused
from vdpabridge.drivers.sim.stream import CHUNK_BYTES_MAX

NUMBERS = st.integers(1, 2**61)
PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def any_path(_path):
    return True


@st.composite
def sessions(draw):
    paths = draw(st.dictionaries(NUMBERS, PATHS, max_size=20)) | {1: ""}
    inodes = {number: Inode(path, draw(st.integers(0, 2**62))) for number, path in paths.items()}
    handles = draw(
        st.dictionaries(NUMBERS, st.builds(Handle, st.sampled_from(sorted(paths)), st.booleans()), max_size=20)
    )
    for handle in handles.values():
        inodes[handle.nodeid].opens += 1
    return FuseSession(
        31, draw(st.integers(0, 2**32 - 1)), inodes, handles, max(inodes) + 1, max(handles, default=0) + 1
    )


@given(sessions())
def test_what_goes_in_comes_out(session):
    assert unpack_session(pack_session(session), any_path) == session


@pytest.mark.parametrize("path", ["nowhere", "many//00001", "/README", "many/", "/" * 60000])
def test_files_that_are_not_there(path):
    """As soon as one is read: what comes after it is not kept."""
    chunks = pack_session(FuseSession(inodes={1: Inode("", 1), 2: Inode(path, 1)}, next_nodeid=3))
    with pytest.raises(StateRefused, match=f"inode 2 is '{path[:200]}', which is not shared here"):
        FsModel().load(chunks)


def test_a_large_session_takes_few_bytes_in_chunks_of_whole_records():
    session = FuseSession(
        inodes={1: Inode("", 1)} | {number: Inode("lines", 1) for number in range(2, 70_000)},
        next_nodeid=70_000,
        handles={number: Handle(1, True) for number in range(1, KNOWN_MAX + 1)},
        next_handle=KNOWN_MAX + 1,
    )
    session.inodes[1].opens = KNOWN_MAX
    chunks = list(pack_session(session))
    assert max(map(len, chunks)) <= CHUNK_BYTES_MAX
    assert sum(map(len, chunks)) < 4 << 20
    assert unpack_session(chunks, any_path) == session


def head(inodes=1, handles=0, next_nodeid=2, next_handle=1):
    return struct.pack("<IIQQII", 31, 0, next_nodeid, next_handle, inodes, handles)


ROOT = struct.pack("<QQH", 1, 1, 0)
HANDLE = struct.pack("<QQB", 1, 1, 1)


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ([], "not a session"),
        ([b"short"], "not a session"),
        ([head(inodes=KNOWN_MAX + 1)], f"more than {KNOWN_MAX}"),
        ([head(handles=KNOWN_MAX + 1)], f"more than {KNOWN_MAX}"),
        ([head()], "fewer inodes"),
        ([head(handles=1), ROOT], "fewer inodes"),
        ([head(), ROOT + b"\0"], "more inodes"),
        ([head(), ROOT, HANDLE], "more inodes"),
        ([head(2), ROOT + ROOT], "comes twice"),
        ([head(2), ROOT + struct.pack("<QQH", 2, 1, 5) + b"line"], "cut off"),
        ([head(2), ROOT[:5], ROOT[5:]], "not a session"),
        ([head(), struct.pack("<QQH", 2, 1, 0)], "inode numbers"),
        ([head(next_nodeid=1), ROOT], "inode numbers"),
        ([head(handles=1, next_handle=1), ROOT + HANDLE], "handle numbers"),
        ([head(handles=2, next_handle=3), ROOT + HANDLE + HANDLE], "handle 1 comes twice"),
        ([head(handles=1, next_handle=3), ROOT + struct.pack("<QQB", 1, 9, 1)], "inode 9, which it does not have"),
        ([head(handles=1, next_handle=3), ROOT + HANDLE[:-1]], "not a session"),
        ([head(next_nodeid=2**64 - 1), ROOT], "counted to 18446744073709551615"),
        ([head(next_handle=2**64 - 1), ROOT], "counted to 18446744073709551615"),
        ([head(), struct.pack("<QQH", 1, 2**64 - 1, 0)], "counted to 18446744073709551615"),
    ],
)
def test_what_is_not_a_session(chunks, why):
    with pytest.raises(StateRefused, match=why):
        unpack_session(chunks, any_path)
