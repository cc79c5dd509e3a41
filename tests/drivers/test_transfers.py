"""State through channels of all sizes and manners: what a front-end reads and writes beside our driver."""

import fcntl
import os
import struct
import threading
from contextlib import contextmanager

import pytest

from vdpabridge.abi.vhost_user import FrontendRequest
from vdpabridge.device import RunState, StateDirection, StatePhase
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.errors import DeadlineExceeded, DeviceFailed, PeerRefused
from vdpabridge.vhost_user.connection import Connection

from ..support.scripted import VIRTIOFSD, scripted

F = FrontendRequest
SMALLEST_PIPE_BYTES = 4096
CHUNK = bytes(range(256)) * 4096


class Worker:
    """A back-end's own thread at the other end of the channel: it writes ``size`` bytes, or reads to the end."""

    def __init__(self, size=0, stop_after=None):
        self.size = size
        self.stop_after = stop_after
        self.read = 0
        self.thread = None
        self.go = threading.Event()
        self.go.set()

    def begin(self, message):
        direction, _ = struct.unpack("=II", message.payload)
        fd = message.take_fds()[0]
        self.thread = threading.Thread(target=self.write if direction == 0 else self.consume, args=[fd])
        self.thread.start()
        return [(F.SET_DEVICE_STATE_FD, 5, struct.pack("=Q", 0x100), ())]

    def write(self, fd):
        left = self.size
        with open(fd, "wb", buffering=0) as file:
            self.go.wait(10)
            while left:
                left -= file.write(CHUNK[: min(left, len(CHUNK))])

    def consume(self, fd):
        with open(fd, "rb", buffering=0) as file:
            while came := file.read(len(CHUNK)):
                self.read += len(came)
                if self.stop_after is not None and self.read >= self.stop_after:
                    return

    def check(self, _message):
        self.thread.join(10)
        return [(F.CHECK_DEVICE_STATE, 5, struct.pack("=Q", self.thread.is_alive()), ())]


@contextmanager
def transferring(worker, timeout_s=10):
    with scripted(VIRTIOFSD) as (back_end, ours):
        back_end.answers |= {F.SET_DEVICE_STATE_FD: worker.begin, F.CHECK_DEVICE_STATE: worker.check}
        with VhostUser(Connection(ours, "the back-end", timeout_s=timeout_s), timeout_s=timeout_s) as device:
            yield device
    if worker.thread is not None:
        worker.thread.join(10)
        assert not worker.thread.is_alive()


def small_pipe():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE_BYTES)
    return reader, writer


SIZES = [0, 1, SMALLEST_PIPE_BYTES - 1, SMALLEST_PIPE_BYTES, SMALLEST_PIPE_BYTES + 1, 65536, 1 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_save_through_the_smallest_pipe(size):
    """An empty state is legal, and in use (Cloud Hypervisor's block back-end)."""
    with transferring(Worker(size)) as device:
        reader, writer = small_pipe()
        with open(reader, "rb") as file:
            device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
            state = file.read()
        device.check_state()
        assert state == (CHUNK * (size // len(CHUNK) + 1))[:size]


@pytest.mark.parametrize("size", SIZES)
def test_load_through_the_smallest_pipe(size):
    worker = Worker()
    with transferring(worker) as device:
        reader, writer = small_pipe()
        with open(writer, "wb") as file:
            device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
            file.write((CHUNK * (size // len(CHUNK) + 1))[:size])
        device.check_state()
        assert worker.read == size


def test_a_gibibyte():
    with transferring(Worker(1 << 30)) as device:
        reader, writer = os.pipe()
        with open(reader, "rb", buffering=0) as file:
            fcntl.fcntl(file, fcntl.F_SETPIPE_SZ, 1 << 20)
            device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
            count = 0
            while came := file.read(1 << 20):
                count += len(came)
        device.check_state()
        assert count == 1 << 30


def test_a_writer_that_stalls_is_a_deadline_and_may_still_end():
    worker = Worker(10)
    worker.go.clear()
    with transferring(worker, timeout_s=0.1) as device:
        reader, writer = os.pipe()
        with open(reader, "rb") as file:
            device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
            with pytest.raises(DeadlineExceeded, match="stuck or slow"):
                device.check_state()
            assert device.state is RunState.RESET
            worker.go.set()
            assert len(file.read()) == 10
        device.timeout_s = 10
        device.check_state()


def test_a_reader_that_closes_early_breaks_the_pipe_and_nothing_else():
    worker = Worker(stop_after=1)
    with transferring(worker) as device:
        reader, writer = small_pipe()
        device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
        with open(writer, "wb", buffering=0) as file, pytest.raises(BrokenPipeError):
            file.writelines([CHUNK] * 100)
        device.check_state()
        device.accept_features(1 << 32)


def test_a_back_end_that_dies_before_the_check():
    worker = Worker(100)
    with transferring(worker) as device:
        reader, writer = os.pipe()
        with open(reader, "rb") as file:
            device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
            file.read()
        worker.check = None
    with scripted(VIRTIOFSD) as (back_end, ours):
        back_end.answers |= {F.SET_DEVICE_STATE_FD: Worker(0).begin, F.CHECK_DEVICE_STATE: lambda _: None}
        with VhostUser(Connection(ours, "the back-end", timeout_s=5), timeout_s=5) as device:
            reader, writer = os.pipe()
            with open(reader, "rb") as file:
                device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
                assert file.read() == b""
            with pytest.raises(DeviceFailed, match="closed the connection"):
                device.check_state()
            assert device.state is RunState.FAILED


@pytest.mark.parametrize("code", [5, 28])
def test_a_back_end_that_says_a_small_errno(code):
    with scripted(VIRTIOFSD) as (back_end, ours):
        back_end.answers[F.SET_DEVICE_STATE_FD] = lambda _: [(F.SET_DEVICE_STATE_FD, 5, struct.pack("=Q", code), ())]
        with VhostUser(Connection(ours, "the back-end", timeout_s=5), timeout_s=5) as device:
            reader, writer = os.pipe()
            with pytest.raises(PeerRefused) as caught:
                device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
            assert caught.value.code == code
            with open(reader, "rb") as file:
                assert file.read() == b"", "nobody has the other end any more"
