"""What the kernel promises of RESUME, which came with Linux 6.3: as tests/vm/test_promises.py, by its requests alone."""

import time
from errno import EINVAL

import pytest

from vdpabridge.abi.vhost import VhostIoctl as Ioctl

from .conftest import WITH_STATE
from .raw import refuses, running_raw


@pytest.fixture
def disk(block_node):
    with running_raw(block_node) as it:
        it.do()
        yield it


def test_a_kick_from_before_the_suspend_is_remembered(disk):
    """It came, and the device was suspended before it looked, or before it had looked at everything."""
    for count in (1, 3, 10) * 20:
        disk.requests(count)
        disk.queue.kick()
        disk.suspend()
        disk.resume()
        if not WITH_STATE:
            # up to 7.2, the worker of vdpa_sim finds the device suspended and does nothing, and RESUME does not make it
            # look again: it remembers only kicks that come while it is suspended. This project's patches mend that
            disk.queue.kick()
        disk.answers(count)


def test_a_kick_while_it_is_suspended_is_remembered(disk):
    for count in (1, 10):
        disk.suspend()
        disk.requests(count)
        disk.queue.kick()
        time.sleep(0.005)
        disk.resume()
        disk.answers(count)


def test_it_goes_on_where_it_stood(disk):
    disk.suspend()
    base = disk.device.base(0)
    disk.resume()
    disk.suspend()
    assert disk.device.base(0) == base == disk.queue.device_used_index
    disk.resume()
    disk.do()
    disk.suspend()
    assert disk.device.base(0) == base + 5


def test_no_call_of_the_meantime_is_lost(disk):
    """The guest is called for what was answered after a resume, although it was called before."""
    for _ in range(20):
        disk.suspend()
        disk.take_calls()
        disk.requests(1)
        disk.queue.kick()
        disk.resume()
        disk.answers(1)


def test_a_resume_of_what_runs_changes_nothing(disk):
    disk.resume()
    disk.do()
    disk.resume()
    disk.do()


def test_after_a_resume_nothing_can_be_set(disk):
    disk.suspend()
    disk.resume()
    with refuses(EINVAL):
        disk.device.of_queue(Ioctl.VHOST_SET_VRING_BASE, 0, 0)
    disk.do()
