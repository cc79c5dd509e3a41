"""A real folder as a simulated file server: what is in it, as it is, and nothing else."""

import errno
import os
import shutil
import stat
from contextlib import ExitStack, closing, contextmanager

import pytest

from vdpabridge.abi.fuse import FUSE_READ_IN, FuseOpcode
from vdpabridge.drivers.names import DeviceNameError
from vdpabridge.drivers.opening import open_device
from vdpabridge.drivers.sim import folder as folder_module
from vdpabridge.drivers.sim.folder import Folder
from vdpabridge.drivers.sim.tree import find
from vdpabridge.errors import VdpaBridgeError
from vdpabridge.guest.fuse import FuseDriver, FuseError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

ROOT = 1


@pytest.fixture
def folder(tmp_path):
    shared = tmp_path / "shared"
    (shared / "below").mkdir(parents=True)
    (shared / "file").write_text("what is in it")
    (shared / "below" / "other").write_text("below")
    (tmp_path / "secret").write_text("not shared")
    (shared / "link").symlink_to(tmp_path / "secret")
    (shared / "links").symlink_to(tmp_path)
    os.mkfifo(shared / "fifo")
    with open(bytes(shared) + b"/odd-\xff", "wb"):
        return shared


@pytest.fixture
def closed_at_the_end():
    with ExitStack() as stack:
        yield lambda each: stack.enter_context(closing(each))


@contextmanager
def mounted(device):
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as hiprio, SplitQueue(memory, 64) as requests:
        device.map([memory.region])
        device.accept_features(1 << 32)
        hiprio.attach(device, 0)
        requests.attach(device, 1)
        device.start()
        fuse = FuseDriver(memory, hiprio, requests, timeout_s=5)
        fuse.init()
        yield fuse
        device.reset()


def test_files(folder):
    with open_device(f"sim:fs,dir={folder}", timeout_s=5) as device, mounted(device) as fuse:
        names = list(fuse.readdir(ROOT, fuse.opendir(ROOT)))
        assert names == [".", "..", "below", "file", os.fsdecode(b"odd-\xff")]
        entry = fuse.walk("file")
        assert (entry.size_bytes, stat.S_ISREG(entry.mode)) == (13, True)
        handle = fuse.open(entry.nodeid)
        assert fuse.read(entry.nodeid, handle, 5, 100) == b"is in it"
        other = fuse.walk("below/other")
        assert fuse.read(other.nodeid, fuse.open(other.nodeid), 0, 100) == b"below"
        # as it is now
        (folder / "file").write_text("something else, and longer")
        assert fuse.getattr(entry.nodeid).size_bytes == 26
        assert fuse.read(entry.nodeid, handle, 0, 9) == b"something"
        (folder / "file").unlink()
        with pytest.raises(FuseError, match=r"ESTALE|ENOENT"):
            fuse.read(entry.nodeid, handle, 0, 9)


@pytest.mark.parametrize("name", ["link", "links", "fifo", "..", ".", "nothing"])
def test_what_is_not_shared(folder, name):
    with (
        open_device(f"sim:fs,dir={folder}", timeout_s=5) as device,
        mounted(device) as fuse,
        pytest.raises(FuseError, match=r"ENOENT|EINVAL"),
    ):
        fuse.lookup(ROOT, name)


@pytest.mark.parametrize("path", ["../secret", "links/secret", "below/../../secret", "a\0b"])
def test_no_path_leads_out(folder, path):
    with closing(Folder(str(folder))) as shared:
        assert find(shared, path) is None
        assert find(shared, "below/other").read(0, 5) == b"below"


def test_its_state_goes_into_another_process(folder, tmp_path):
    """Files are known by their paths: another server of the same folder takes them."""
    import vdpabridge

    with open_device(f"sim:fs,dir={folder}", timeout_s=5) as device, mounted(device) as fuse:
        fuse.open(fuse.walk("below/other").nodeid)
        vdpabridge.save(device, tmp_path / "image")
    with open_device(f"sim:fs,dir={folder}", timeout_s=5) as device:
        vdpabridge.load_state(device, tmp_path / "image")
    (tmp_path / "empty").mkdir()
    with (
        open_device(f"sim:fs,dir={tmp_path}/empty", timeout_s=5) as device,
        pytest.raises(VdpaBridgeError, match="which is not shared here"),
    ):
        vdpabridge.load_state(device, tmp_path / "image")


def test_what_cannot_be_shared(tmp_path):
    with pytest.raises(VdpaBridgeError, match="No such file or directory"):
        open_device(f"sim:fs,dir={tmp_path}/nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(VdpaBridgeError, match="Not a directory"):
        open_device(f"sim:fs,dir={tmp_path}/file")
    with pytest.raises(DeviceNameError, match="which dir= replaces"):
        open_device(f"sim:fs,dir={tmp_path},files=3")


def test_a_directory_that_becomes_a_link_leads_nowhere(folder, tmp_path, closed_at_the_end):
    """Whoever can write to the folder can put a link in the place of a directory at any moment."""
    shared = closed_at_the_end(Folder(str(folder)))
    below = shared.entry("below")
    other = below.entry("other")
    assert other.read(0, 5) == b"below"
    (folder / "below").rename(folder / "was-below")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "other").write_text("SECRET")
    (folder / "below").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels of symbolic links"):
        other.read(0, 6)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels of symbolic links"):
        below.listing()
    assert below.entry("other") is None
    assert other.size_bytes == 0


@pytest.mark.parametrize("what", ["link", "fifo"])
def test_a_file_that_becomes_something_else(folder, tmp_path, closed_at_the_end, what):
    shared = closed_at_the_end(Folder(str(folder)))
    file = shared.entry("file")
    (folder / "file").unlink()
    if what == "link":
        (tmp_path / "elsewhere").write_text("SECRET")
        (folder / "file").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            file.read(0, 6)
    else:
        # nobody writes into it
        os.mkfifo(folder / "file")
        with pytest.raises(OSError, match="Illegal seek"):
            file.read(0, 6)


def test_trouble_of_this_process_is_not_a_file_that_does_not_exist(folder, closed_at_the_end, monkeypatch):
    """Out of descriptors: the guest gets an error, not a file that is gone or empty."""

    def no_descriptor(*_words, **_options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with open_device(f"sim:fs,dir={folder}", timeout_s=5) as device, mounted(device) as fuse:
        entry = fuse.walk("file")
        with monkeypatch.context() as patch:
            patch.setattr(folder_module.os, "open", no_descriptor)
            for act in (lambda: fuse.lookup(ROOT, "file"), lambda: fuse.getattr(entry.nodeid)):
                with pytest.raises(FuseError, match="EMFILE"):
                    act()
        assert fuse.getattr(entry.nodeid).size_bytes == 13


def test_a_read_asks_the_disk_for_no_more_than_a_driver_has_room_for(folder, monkeypatch):
    asked = []
    pread = os.pread
    with open_device(f"sim:fs,dir={folder}", timeout_s=5) as device, mounted(device) as fuse:
        entry = fuse.walk("file")
        handle = fuse.open(entry.nodeid)
        monkeypatch.setattr(folder_module.os, "pread", lambda fd, size, at: asked.append(size) or pread(fd, size, at))
        body = FUSE_READ_IN.pack(handle, 0, 0xFFFFFFFF, 0, 0, 0, 0)
        fuse._ask(FuseOpcode.FUSE_READ, entry.nodeid, body, 13)
    assert asked == [1 << 20]


def test_a_directory_that_is_read_again_from_its_beginning_is_as_it_is_now(folder):
    with open_device(f"sim:fs,dir={folder}", timeout_s=5) as device, mounted(device) as fuse:
        handle = fuse.opendir(ROOT)
        before = list(fuse.readdir(ROOT, handle))
        (folder / "new").write_text("")
        assert set(fuse.readdir(ROOT, handle)) == {*before, "new"}


def test_a_folder_that_is_gone_is_an_error_to_the_guest(folder):
    with open_device(f"sim:fs,dir={folder}", timeout_s=5) as device, mounted(device) as fuse:
        handle = fuse.opendir(ROOT)
        below = fuse.walk("below")
        inner = fuse.opendir(below.nodeid)
        shutil.rmtree(folder / "below")
        with pytest.raises(FuseError, match=r"ENOENT|ESTALE"):
            list(fuse.readdir(below.nodeid, inner))
        assert "file" in list(fuse.readdir(ROOT, handle))


def test_an_offset_that_no_file_has(folder):
    with open_device(f"sim:fs,dir={folder}", timeout_s=5) as device, mounted(device) as fuse:
        entry = fuse.walk("file")
        with pytest.raises(FuseError, match="EINVAL"):
            fuse.read(entry.nodeid, fuse.open(entry.nodeid), 1 << 63, 16)


def test_a_large_folder_is_read_once(tmp_path, monkeypatch):
    """And not anew for each of the many requests that it takes."""
    for number in range(2000):
        (tmp_path / f"{number:05}").touch()
    scans = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda fd: (scans.append(fd), scandir(fd))[1])
    with open_device(f"sim:fs,dir={tmp_path}", timeout_s=5) as device, mounted(device) as fuse:
        assert len(list(fuse.readdir(ROOT, fuse.opendir(ROOT)))) == 2002
    assert len(scans) == 1
