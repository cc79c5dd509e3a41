"""Errors read as one line and carry their facts."""

import errno

import pytest

from vdpabridge.errors import DeadlineExceeded, KernelError, MissingCapability, StateError, VdpaBridgeError, errno_name
from vdpabridge.linux.deadline import Deadline


def test_one_line_with_all_parts():
    error = VdpaBridgeError("suspend", device="d0", why="it runs away", hint="hold it")
    assert str(error) == "d0: suspend: it runs away (hold it)"
    assert str(VdpaBridgeError("suspend")) == "suspend"


def test_kernel_errors_are_os_errors_with_the_kernels_errno():
    error = KernelError(errno.EBUSY, "VHOST_SET_OWNER", device="/dev/vhost-vdpa-0", queue=3)
    assert isinstance(error, OSError)
    assert (error.errno, error.request, error.queue) == (errno.EBUSY, "VHOST_SET_OWNER", 3)
    assert str(error) == "/dev/vhost-vdpa-0: VHOST_SET_OWNER queue 3: EBUSY: Device or resource busy"
    with pytest.raises(OSError) as caught:
        raise error
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(("code", "name"), [(95, "EOPNOTSUPP"), (524, "ENOTSUPP"), (16, "EBUSY"), (9999, "errno 9999")])
def test_errno_names_are_the_kernels(code, name):
    assert errno_name(code) == name


def test_deadlines_are_timeouts():
    assert isinstance(DeadlineExceeded("x", 1.5), TimeoutError)
    assert str(DeadlineExceeded("suspend", 1.5, device="d0")) == "d0: suspend: no answer within 1.5 s"
    assert MissingCapability("d0", "resume", "RESUME", "replay").capability == "RESUME"


def test_deadline_counts_down():
    assert Deadline(None).left_s() is None
    assert not Deadline(None).passed
    assert Deadline(0).passed
    assert 0 < Deadline(10).left_s() <= 10


@pytest.mark.parametrize(
    ("code", "nothing_done"),
    [(errno.ENOTTY, True), (errno.EOPNOTSUPP, True), (errno.EPERM, True), (errno.EIO, False), (errno.EBUSY, False)],
)
def test_only_what_was_not_begun_has_certainly_done_nothing(code, nothing_done):
    """Every other errno can come out of the middle of a request."""
    assert KernelError(code, "VHOST_VDPA_SUSPEND", device="d").nothing_done is nothing_done
    assert StateError("d", "start", "reset", ()).nothing_done
    assert MissingCapability("d", "suspend", "SUSPEND", "").nothing_done
    assert not DeadlineExceeded("start", 1).nothing_done
    assert not VdpaBridgeError("start").nothing_done
