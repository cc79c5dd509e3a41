"""The requests of the proposal by themselves: every row of its table of errors, beneath the driver and its precautions.

Source: Documentation/userspace-api/vhost-vdpa-device-state.rst, in vm-images/kernel/patches.
"""

import fcntl
import os
import resource
import select
import struct
from contextlib import suppress
from errno import (
    EBADF,
    EBADMSG,
    EBUSY,
    ECANCELED,
    EFAULT,
    EFBIG,
    EINVAL,
    EMFILE,
    ENODATA,
    EOPNOTSUPP,
    EPERM,
    EPIPE,
    ESPIPE,
)

import pytest

from vdpabridge.abi.vhost import VhostIoctl as Ioctl

from ..raw import CANCEL, LIVE, LOAD, SAVE, backend_features, raw, refuses

DEVICE_STATE = 1 << 60


@pytest.fixture
def device(nodes):
    with raw(nodes[0]) as opened:
        yield opened


# --- the feature bit ---


def test_the_bit_is_offered_and_accepted(device):
    assert backend_features(device) & DEVICE_STATE
    device.ask(Ioctl.VHOST_SET_BACKEND_FEATURES, bytearray(struct.pack("=Q", DEVICE_STATE)))


def test_a_device_without_state_neither_offers_nor_accepts_it(block_node):
    with raw(block_node) as disk:
        assert not backend_features(disk) & DEVICE_STATE
        with refuses(EOPNOTSUPP):
            disk.ask(Ioctl.VHOST_SET_BACKEND_FEATURES, bytearray(struct.pack("=Q", DEVICE_STATE)))
        for request in (lambda: disk.begin(SAVE), lambda: disk.begin(CANCEL), disk.check):
            with refuses(EOPNOTSUPP):
                request()


# --- beginning ---

NOT_BEGUN = {
    "a direction that there is not": ({"direction": 3}, EINVAL),
    "a phase that there is not": ({"direction": SAVE, "phase": 1}, EINVAL),
    "a flag": ({"direction": SAVE, "flags": 1}, EINVAL),
    "a descriptor of the caller's": ({"direction": SAVE, "fd": 0}, EINVAL),
    "cancelling in another phase": ({"direction": CANCEL, "phase": 1}, EINVAL),
}


@pytest.mark.parametrize("case", NOT_BEGUN)
def test_what_cannot_be_begun(device, case):
    arguments, code = NOT_BEGUN[case]
    before = os.listdir("/proc/self/fd")
    with refuses(code):
        device.begin(**arguments)
    assert os.listdir("/proc/self/fd") == before
    assert device.save()


def test_only_the_owner_has_the_state(nodes):
    with raw(nodes[0], owner=False) as device:
        for request in (lambda: device.begin(SAVE), lambda: device.begin(CANCEL), device.check):
            with refuses(EPERM):
                request()


def test_a_child_is_not_the_owner(device):
    child = os.fork()
    if child == 0:
        code = 0
        try:
            device.begin(SAVE)
        except OSError as error:
            code = error.errno
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EPERM


def test_an_argument_that_is_not_there(device):
    with refuses(EFAULT):
        device.ask(Ioctl.VHOST_VDPA_SET_DEVICE_STATE_FD, 0)


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_not_while_the_device_runs(device, direction):
    device.run()
    with refuses(EBUSY):
        device.begin(direction)
    device.ask(Ioctl.VHOST_VDPA_SUSPEND)
    os.close(device.begin(direction))


@pytest.mark.parametrize("direction", [SAVE, LOAD])
@pytest.mark.parametrize("state", ["as it was opened", "negotiated", "suspended"])
def test_while_the_device_is_stopped(device, direction, state):
    """At status 0 too: a VMM over vhost-user loads before anything else, and what it loads survives negotiation."""
    {"as it was opened": lambda: None, "negotiated": device.negotiate, "suspended": device.suspend}[state]()
    saved = device.save()
    if direction == LOAD:
        device.load(saved)
        assert device.check() == 0
    assert device.save() == saved


def test_one_transfer_at_a_time(device):
    for first in (SAVE, LOAD):
        fd = device.begin(first)
        for second in (SAVE, LOAD):
            with refuses(EBUSY):
                device.begin(second)
        os.close(fd)
        # closed, but not checked
        with refuses(EBUSY):
            device.begin(SAVE)
        assert device.begin(CANCEL) == -1
    assert device.save()


def test_no_descriptor_left(device):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, limit[1]))
        with suppress(OSError):
            while True:
                held.append(os.dup(0))
        with refuses(EMFILE):
            device.begin(SAVE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for fd in held:
            os.close(fd)
    assert device.save()


# --- the descriptor ---


def test_the_descriptor_of_a_save(device):
    fd = device.begin(SAVE)
    assert not os.get_inheritable(fd)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with refuses(ESPIPE):
        os.lseek(fd, 0, os.SEEK_SET)
    with refuses(EBADF):
        os.write(fd, b"x")
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == [(fd, select.POLLIN)]
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        assert epoll.poll(0) == [(fd, select.EPOLLIN)]
    assert os.read(fd, 0) == b""
    whole = b"".join(iter(lambda: os.read(fd, 7), b""))
    assert os.read(fd, 10) == b""
    os.close(fd)
    assert device.check() == 0
    assert whole == device.save()


def test_the_descriptor_of_a_load(device):
    state = device.save()
    fd = device.begin(LOAD)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    with refuses(EBADF):
        os.read(fd, 1)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    assert poll.poll(0) == [(fd, select.POLLOUT)]
    for byte in state:
        assert os.write(fd, bytes([byte])) == 1
    os.close(fd)
    assert device.check() == 0


def test_memory_that_cannot_be_read_or_written(device):
    state = device.save()
    fd = device.begin(SAVE)
    with refuses(EFAULT):
        libc_call("read", fd, 8, 100)
    assert b"".join(iter(lambda: os.read(fd, 4096), b"")) == state, "nothing is lost by it"
    os.close(fd)
    assert device.check() == 0
    fd = device.begin(LOAD)
    with refuses(EFAULT):
        libc_call("write", fd, 8, 100)
    os.write(fd, state)
    os.close(fd)
    assert device.check() == 0


def libc_call(name, fd, address, size):
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(fd, ctypes.c_void_p(address), ctypes.c_size_t(size)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# --- checking ---


def test_nothing_to_check(device):
    with refuses(EINVAL):
        device.check()
    device.save()
    with refuses(EINVAL):
        device.check()


def test_a_save_is_checked_when_it_was_read(device):
    fd = device.begin(SAVE)
    with refuses(EBUSY):
        device.check()
    os.read(fd, 10)
    with refuses(EBUSY):
        device.check()
    while os.read(fd, 4096):
        pass
    assert device.check() == 0, "it need not be closed"
    os.close(fd)


def test_a_save_that_was_not_read_whole(device):
    fd = device.begin(SAVE)
    os.read(fd, 10)
    os.close(fd)
    with refuses(EPIPE):
        device.check()
    with refuses(EINVAL):
        device.check()


def test_a_load_is_checked_when_it_is_closed(device):
    state = device.save()
    fd = device.begin(LOAD)
    os.write(fd, state)
    with refuses(EBUSY):
        device.check()
    other = os.dup(fd)
    os.close(fd)
    with refuses(EBUSY):
        device.check()
    os.close(other)
    assert device.check() == 0


NOT_LOADED = {
    "nothing": (lambda state: b"", ENODATA),
    "its beginning": (lambda state: state[:30], ENODATA),
    "almost all of it": (lambda state: state[:-1], EBADMSG),
    "a byte more": (lambda state: state + b"\0", EBADMSG),
    "something else": (lambda state: b"x" * len(state), EBADMSG),
    "another version": (lambda state: state[:8] + b"\3\0\0\0" + state[12:], EOPNOTSUPP),
    "another device's": (lambda state: state[:12] + b"\2\0\0\0" + state[16:], EINVAL),
    "a byte that is wrong": (lambda state: state[:40] + b"\xff" + state[41:], EBADMSG),
}


@pytest.mark.parametrize("case", NOT_LOADED)
def test_what_is_not_loaded(device, case):
    change, code = NOT_LOADED[case]
    before = device.save()
    device.load(change(before))
    with refuses(code):
        device.check()
    with refuses(EINVAL):
        device.check()
    assert device.save() == before


def test_more_than_any_state(device):
    before = device.save()
    fd = device.begin(LOAD)
    piece = bytes(1 << 20)
    with refuses(EFBIG):
        while True:
            os.write(fd, piece)
    with refuses(EFBIG):
        os.write(fd, b"x")
    os.close(fd)
    with refuses(EFBIG):
        device.check()
    assert device.save() == before


# --- what ends a transfer ---

ENDS = {
    "reset": lambda device: device.status(0),
    "resume": lambda device: device.ask(Ioctl.VHOST_VDPA_RESUME),
}


@pytest.mark.parametrize("direction", [SAVE, LOAD])
@pytest.mark.parametrize("how", ENDS)
def test_what_ends_a_transfer(device, how, direction):
    device.suspend()
    fd = device.begin(direction)
    ENDS[how](device)
    with refuses(ECANCELED):
        os.read(fd, 10) if direction == SAVE else os.write(fd, b"x")
    poll = select.poll()
    poll.register(fd)
    assert poll.poll(0)[0][1] & select.POLLERR
    with refuses(ECANCELED):
        device.check()
    with refuses(EINVAL):
        device.check()
    os.close(fd)


def test_a_transfer_that_was_ended_makes_room(device):
    device.suspend()
    fd = device.begin(SAVE)
    device.ask(Ioctl.VHOST_VDPA_RESUME)
    device.ask(Ioctl.VHOST_VDPA_SUSPEND)
    assert device.save()
    with refuses(ECANCELED):
        os.read(fd, 1)
    os.close(fd)


def test_a_device_does_not_start_with_half_a_state(device):
    device.negotiate()
    state = device.save()
    fd = device.begin(LOAD)
    with refuses(EBUSY):
        device.status(LIVE)
    os.write(fd, state)
    os.close(fd)
    with refuses(EBUSY):
        device.status(LIVE)
    assert device.check() == 0
    device.status(LIVE)


def test_a_device_that_starts_ends_a_save(device):
    device.negotiate()
    fd = device.begin(SAVE)
    device.status(LIVE)
    with refuses(ECANCELED):
        os.read(fd, 1)
    with refuses(ECANCELED):
        device.check()
    os.close(fd)


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_a_descriptor_that_outlives_its_device(nodes, direction):
    with raw(nodes[0]) as device:
        fd = device.begin(direction)
    with refuses(ECANCELED):
        os.read(fd, 1) if direction == SAVE else os.write(fd, b"x")
    with raw(nodes[0]) as device:
        with refuses(EINVAL):
            device.check()
        os.close(fd)
        assert device.save()


def test_a_descriptor_does_not_keep_its_device(nodes):
    """What the node's last close does, it does at once: the device can be opened again while the descriptor is open."""
    with raw(nodes[0]) as device:
        fd = device.begin(SAVE)
    for _ in range(3):
        with raw(nodes[0]) as device:
            assert device.save()
    os.close(fd)


def test_a_cancelled_load_changes_nothing(device):
    before = device.save()
    device.load(before)
    assert device.begin(CANCEL) == -1
    with refuses(EINVAL):
        device.check()
    assert device.save() == before
    assert device.begin(CANCEL) == -1, "also if there is nothing to cancel"
