"""Errors read as one line and carry their facts."""

import errno
import time

import pytest

from vdpabridge.deadline import Deadline, StillRunning, call_within
from vdpabridge.errors import DeadlineExceeded, KernelError, MissingCapability, VdpaBridgeError, errno_name


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


def test_call_within():
    assert call_within(1, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_within(1, lambda: 1 // 0)
    late = []
    with pytest.raises(StillRunning):
        call_within(0.01, lambda: time.sleep(0.1) or 9, late.append)
    time.sleep(0.2)
    assert late == [9]
