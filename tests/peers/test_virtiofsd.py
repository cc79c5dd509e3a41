"""A real, stateful back-end: our driver mounts virtiofsd by FUSE messages, and carries its state into another."""

import os
import resource
import threading
from contextlib import ExitStack, contextmanager

import pytest

from vdpabridge.device import Capability, DirtyLog, RunState
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import DeviceFailed, PeerRefused, VdpaBridgeError
from vdpabridge.guest.fuse import FuseDriver, FuseError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.procedures import ProcedureFailed, load as load_image, migrate, save, save_file
from vdpabridge.state.snapshot import QueueEventfds
from vdpabridge.state.transfer.channel import Limits

from ..support.machine import end
from ..support.state import load, state_of
from ..support.transitions import shared_file

VERSION_1 = 1 << 32
ROOT = 1
FS = 26
#: virtiofsd keeps a descriptor for each file that it knows, unless it is told to use file handles.
MODES = {
    "find-paths": (["--migration-mode", "find-paths"], []),
    "find-paths, prepared": (["--migration-mode", "find-paths"], []),
    "file-handles": (["--migration-mode", "file-handles"], ["--modcaps=+dac_read_search"]),
}
OPENED = 3


@pytest.fixture
def shared(lab):
    return lab.shared()


def fill(shared, count):
    """``count`` files in directories of 1 000; the first few have something in them."""
    for number in range(count):
        path = shared / path_of(number)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"this is file {number}\n" if number < OPENED else "")


def path_of(number):
    return f"d{number // 1000}/f{number}"


class Mount:
    """A guest's driver on two rings, that can be moved from one device to another."""

    def __init__(self, stack):
        self.memory = stack.enter_context(GuestMemory(2 << 20))
        self.hiprio = stack.enter_context(SplitQueue(self.memory, 128))
        self.requests = stack.enter_context(SplitQueue(self.memory, 128))
        self.fuse = FuseDriver(self.memory, self.hiprio, self.requests)

    def eventfds(self):
        return {
            index: QueueEventfds(ring.kick_fd, ring.call_fd) for index, ring in enumerate((self.hiprio, self.requests))
        }

    def attach(self, device, bases=(0, 0)):
        device.map([self.memory.region])
        device.accept_features(VERSION_1)
        self.hiprio.attach(device, 0, bases[0])
        self.requests.attach(device, 1, bases[1])
        device.start()


@contextmanager
def mounted(lab, shared, *options):
    with ExitStack() as stack:
        mount = Mount(stack)
        lab.virtiofsd(shared, "a.sock", *options)
        device = stack.enter_context(VhostUser.open(lab.path("a.sock"), device_id=FS, timeout_s=60))
        mount.attach(device)
        mount.fuse.init()
        yield device, mount


def bases(device):
    return [device.get_base(index).avail_index for index in (0, 1)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [10, 1000, 20000])
def test_open_files_survive_the_process_that_has_them(lab, shared, count, mode):
    if mode == "file-handles" and os.geteuid() != 0:
        pytest.skip("opening files by handle takes root")
    source_options, destination_options = MODES[mode]
    enough = resource.getrlimit(resource.RLIMIT_NOFILE)[1] > count + 500
    handles = [] if enough else ["--inode-file-handles=prefer"]
    fill(shared, count)
    with mounted(lab, shared, *source_options, *handles) as (source, mount), shared_file(1 << 16) as log:
        fuse = mount.fuse
        if mode.endswith("prepared"):
            # to virtiofsd, logging dirty pages means that a migration has begun
            source.set_dirty_log(DirtyLog(log, 1 << 16))
        directories = [fuse.lookup(ROOT, f"d{each}").nodeid for each in range(-(-count // 1000))]
        known = [fuse.lookup(directories[number // 1000], f"f{number}").nodeid for number in range(count)]
        opened = [(number, known[number], fuse.open(known[number])) for number in range(OPENED)]
        listing = fuse.opendir(directories[0])
        for number, nodeid, handle in opened:
            assert fuse.read(nodeid, handle, 0, 4) == f"this is file {number}\n".encode()[:4]
        source.suspend()
        state = state_of(source)
        assert len(state) > 8 * count
        assert state[0] == 1, "postcard, version 2"
        lab.virtiofsd(shared, "b.sock", *destination_options, *source_options, *handles)
        with VhostUser.open(lab.path("b.sock"), device_id=FS, timeout_s=60) as destination:
            load(destination, state)
            mount.attach(destination, bases(source))
            for number, nodeid, handle in opened:
                assert fuse.read(nodeid, handle, 4, 4096) == f"this is file {number}\n".encode()[4:]
                assert fuse.getattr(nodeid).size_bytes == len(f"this is file {number}\n")
            names = set(fuse.readdir(directories[0], listing))
            assert names == {".", "..", *(f"f{number}" for number in range(min(count, 1000)))}
            assert fuse.lookup(directories[-1], f"f{count - 1}").nodeid == known[-1], "the same inode as before"
            for _, nodeid, handle in opened:
                fuse.release(nodeid, handle)
            for nodeid in known[:5]:
                fuse.forget(nodeid)


def test_what_virtiofsd_can_do(lab, shared):
    with mounted(lab, shared) as (device, _):
        assert device.capabilities == {
            Capability.SUSPEND,
            Capability.RESUME,
            Capability.SETUP_WHILE_SUSPENDED,
            Capability.QUEUE_CONTROL,
            Capability.ENABLE_WHILE_RUNNING,
            Capability.DEVICE_STATE,
            Capability.DIRTY_LOG,
            Capability.STATE_RESET,
        }
        assert device.identity.queue_count == 2


def test_the_source_goes_on_after_a_save(lab, shared):
    fill(shared, 10)
    with mounted(lab, shared) as (device, mount):
        nodeid = mount.fuse.walk("d0/f1").nodeid
        handle = mount.fuse.open(nodeid)
        for _ in range(3):
            device.suspend()
            assert state_of(device) == state_of(device)
            device.resume()
            assert mount.fuse.read(nodeid, handle, 0, 4096) == b"this is file 1\n"


DAMAGES = {
    "cut in the middle": lambda state: state[: len(state) // 2],
    "nothing": lambda state: b"",
    "another version": lambda state: b"\7" + state[1:],
    # not zeros: those are a valid, empty state of version 1, and what follows it is not looked at
    "noise": lambda state: b"\xa5" * 256,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_state_is_refused_and_the_source_goes_on(lab, shared, name):
    fill(shared, 10)
    with mounted(lab, shared) as (source, mount):
        nodeid = mount.fuse.walk("d0/f1").nodeid
        handle = mount.fuse.open(nodeid)
        source.suspend()
        state = state_of(source)
        daemon = lab.virtiofsd(shared, "b.sock")
        with VhostUser.open(lab.path("b.sock"), device_id=FS, timeout_s=20) as destination:
            with pytest.raises(PeerRefused, match="failed to process its state") as caught:
                load(destination, DAMAGES[name](state))
            assert caught.value.request == 43
            assert destination.state is RunState.RESET
        daemon.wait(10)
        source.resume()
        assert mount.fuse.read(nodeid, handle, 0, 4096) == b"this is file 1\n"


def test_no_state_before_a_session(lab, shared):
    """The state of a file server that nobody has mounted is small, and may be loaded."""
    with ExitStack() as stack:
        devices = []
        for name in ("a.sock", "b.sock"):
            lab.virtiofsd(shared, name)
            devices.append(stack.enter_context(VhostUser.open(lab.path(name), device_id=FS, timeout_s=20)))
        state = state_of(devices[0])
        assert len(state) < 64
        load(devices[1], state)


def test_a_back_end_that_is_killed(lab, shared):
    fill(shared, 10)
    with ExitStack() as stack:
        mount = Mount(stack)
        daemon = lab.virtiofsd(shared, "a.sock")
        device = stack.enter_context(VhostUser.open(lab.path("a.sock"), device_id=FS, timeout_s=20))
        mount.attach(device)
        mount.fuse.init()
        device.check_health()
        end(daemon, 9)
        with pytest.raises(DeviceFailed, match="closed the connection"):
            device.check_health()
        with pytest.raises((DeviceFailed, VdpaBridgeError)):
            device.suspend()
        assert device.state is RunState.FAILED


def test_a_reset_ends_the_session(lab, shared):
    fill(shared, 10)
    with mounted(lab, shared) as (device, mount):
        nodeid = mount.fuse.walk("d0/f1").nodeid
        device.suspend()
        at = bases(device)
        device.reset()
        device.unmap([mount.memory.region])
        mount.attach(device, at)
        mount.fuse.init()
        with pytest.raises(FuseError, match=r"EBADF|ESTALE|EINVAL|ENOENT"):
            mount.fuse.getattr(nodeid)


@pytest.mark.parametrize("by", ["file", "pipe"])
def test_by_an_image(lab, shared, by, tmp_path):
    """Through an image in a file, and through one in a pipe, as between two machines."""
    fill(shared, 50)
    with mounted(lab, shared) as (source, mount):
        nodeid = mount.fuse.walk("d0/f1").nodeid
        handle = mount.fuse.open(nodeid)
        lab.virtiofsd(shared, "b.sock")
        with VhostUser.open(lab.path("b.sock"), device_id=FS, timeout_s=20) as destination:
            destination.map([mount.memory.region])
            if by == "file":
                save_file(source, str(tmp_path / "image"), Limits(Deadline(20)), stay_suspended=True)
                with (tmp_path / "image").open("rb") as file:
                    load_image(destination, file.fileno(), Limits(Deadline(20)), mount.eventfds())
            else:
                reader, writer = os.pipe()
                thread = threading.Thread(
                    target=load_image, args=[destination, reader, Limits(Deadline(20)), mount.eventfds()]
                )
                thread.start()
                save(source, writer, Limits(Deadline(20)), stay_suspended=True)
                os.close(writer)
                thread.join()
                os.close(reader)
            assert mount.fuse.read(nodeid, handle, 0, 4096) == b"this is file 1\n"
            assert (source.state, destination.state) == (RunState.SUSPENDED, RunState.RUNNING)


def test_migrate(lab, shared):
    fill(shared, 50)
    with mounted(lab, shared) as (source, mount):
        nodeid = mount.fuse.walk("d0/f1").nodeid
        handle = mount.fuse.open(nodeid)
        lab.virtiofsd(shared, "b.sock")
        with VhostUser.open(lab.path("b.sock"), device_id=FS, timeout_s=20) as destination:
            destination.map([mount.memory.region])
            report = migrate(source, destination, Limits(Deadline(20)))
            assert report.state_bytes > 20
            assert mount.fuse.read(nodeid, handle, 0, 4096) == b"this is file 1\n"


def test_a_destination_that_fails_leaves_the_source_mounted(lab, shared):
    fill(shared, 50)
    with mounted(lab, shared, "--migration-mode", "file-handles") as (source, mount):
        nodeid = mount.fuse.walk("d0/f1").nodeid
        handle = mount.fuse.open(nodeid)
        lab.virtiofsd(shared, "b.sock")  # which may not open files by handle
        with VhostUser.open(lab.path("b.sock"), device_id=FS, timeout_s=20) as destination:
            destination.map([mount.memory.region])
            with pytest.raises(ProcedureFailed, match="failed to process its state") as caught:
                migrate(source, destination, Limits(Deadline(20)))
            assert caught.value.running == source.name
            assert mount.fuse.read(nodeid, handle, 0, 4096) == b"this is file 1\n"
