"""Device state by the kernel's requests: what the driver remembers, whatever the kernel answers, or does not.

What a kernel that has them does is in tests/vm/state.
"""

import os
from contextlib import contextmanager, suppress
from errno import EBADMSG, EBUSY, ECANCELED, EINVAL

import pytest

from vdpabridge.device import Capability, RunState, StateDirection, StatePhase
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import DeadlineExceeded, KernelError, MissingCapability
from vdpabridge.state.procedures import steps

from ..support.fake_kernel import FakeKernel, Parent
from ..support.transitions import begin_state
from ..support.waiting import wait_until

NODE = "/dev/vhost-vdpa-0"
SET, CHECK = "VHOST_VDPA_SET_DEVICE_STATE_FD", "VHOST_VDPA_CHECK_DEVICE_STATE"
SAVE, LOAD = StateDirection.SAVE, StateDirection.LOAD


@contextmanager
def opened(timeout_s=5, **options):
    kernel = FakeKernel(Parent(has_state=options.pop("has_state", True), **options))
    with VhostVdpa.open(NODE, system=kernel, timeout_s=timeout_s) as device:
        kernel.log.clear()
        yield kernel, device


def is_open(fd):
    """Whether the kernel's descriptor is; its number may be in use for something else."""
    with suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:state")
    return False


def running(device):
    device.accept_features(1 << 32)
    device.start()


def test_a_kernel_without_it():
    with opened(has_state=False) as (kernel, device):
        assert Capability.DEVICE_STATE not in device.capabilities
        reader, writer = os.pipe()
        with open(reader, "rb") as file:
            with pytest.raises(MissingCapability, match="DEVICE_STATE"):
                device.set_state_fd(SAVE, StatePhase.STOPPED, writer)
            assert file.read() == b"", "the descriptor is closed"
        assert kernel.log == []


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_the_kernels_descriptor_is_the_callers(direction):
    with opened() as (kernel, device):
        with begin_state(device, direction) as file:
            assert file.fileno() == kernel.state_fds[0]
            assert not os.get_blocking(file.fileno()), "it never blocks, so nobody has to look for how much fits"
        device.check_state()
        assert kernel.log == [SET, CHECK]
        assert not is_open(kernel.state_fds[0])


def test_a_check_waits_for_the_other_end():
    with opened() as (kernel, device):
        begin_state(device, LOAD).close()
        kernel.checks = [EBUSY] * 5
        device.check_state()
        assert kernel.log == [SET] + [CHECK] * 6


def test_a_check_does_not_wait_for_ever():
    with opened(timeout_s=0.05) as (kernel, device):
        begin_state(device, LOAD).close()
        kernel.checks = [EBUSY] * 1000
        with pytest.raises(DeadlineExceeded, match="has not closed its descriptor"):
            device.check_state()
        assert device.state is RunState.RESET
        device.timeout_s = 5
        device.abandon_state()
        assert (kernel.log[-1], kernel.transfer) == (SET, None)
        device.abandon_state()
        assert kernel.log.count(SET) == 2, "there is nothing to abandon"


@pytest.mark.parametrize(("code", "why"), [(EBADMSG, "the state is damaged"), (ECANCELED, "resumed, started or reset")])
def test_a_check_that_fails_is_over(code, why):
    with opened() as (kernel, device):
        begin_state(device, LOAD).close()
        kernel.checks = [code]
        with pytest.raises(KernelError, match=why) as caught:
            device.check_state()
        assert (caught.value.errno, caught.value.request) == (code, CHECK)
        device.abandon_state()
        assert kernel.log == [SET, CHECK]


def test_nothing_to_check():
    with opened() as (_, device), pytest.raises(KernelError) as caught:
        device.check_state()
    assert caught.value.errno == EINVAL


GO_ON = {
    "another transfer": (lambda device: begin_state(device, SAVE).close(), [SET, SET]),
    "a resume": (lambda device: device.resume(), [SET, "VHOST_VDPA_RESUME"]),
}


@pytest.mark.parametrize("how", GO_ON)
def test_what_ends_a_transfer(how):
    act, asked = GO_ON[how]
    with opened() as (kernel, device):
        running(device)
        device.suspend()
        begin_state(device, LOAD).close()
        kernel.log.clear()
        act(device)
        assert [name for name in kernel.log if "STATUS" not in name] == asked


def test_a_start_ends_a_load_that_the_kernel_would_wait_for():
    with opened() as (kernel, device):
        device.accept_features(1 << 32)
        begin_state(device, LOAD).close()
        device.start()
        assert kernel.transfer is None


def test_a_reset_ends_it_by_itself():
    with opened() as (kernel, device):
        begin_state(device, LOAD).close()
        device.reset()
        device.abandon_state()
        assert kernel.log.count(SET) == 1


@pytest.mark.parametrize("then", ["abandon", "reset", "close"])
def test_a_descriptor_that_comes_too_late_is_closed(then):
    """The deadline passes while the request is in the kernel, which makes a descriptor that nobody waits for."""
    with opened(timeout_s=0.1) as (kernel, device):
        kernel.hang_on = SET
        with pytest.raises(DeadlineExceeded):
            begin_state(device, SAVE)
        kernel.hang_on = None
        kernel.release.set()
        wait_until(lambda: not device._node.stuck)
        device.timeout_s = 5
        assert is_open(kernel.state_fds[0])
        {"abandon": device.abandon_state, "reset": device.reset, "close": device.close}[then]()
        assert not is_open(kernel.state_fds[0])


def test_a_save_that_stays_suspended_needs_no_resume():
    with opened(resume="no") as (_, device):
        running(device)
        with pytest.raises(MissingCapability, match="RESUME"):
            steps.begin(device, "save", frozenset())
        steps.begin(device, "save", frozenset(), resumes=False)
