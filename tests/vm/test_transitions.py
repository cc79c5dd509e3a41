"""The state table on a real device: every pair, and walks of any length that hypothesis thinks of."""

import random

import pytest

from vdpabridge.device import Capability, RunState
from vdpabridge.errors import MissingCapability, StateError

from ..support.release import since
from ..support.transitions import PAIRS, check_pair
from ..support.walks import walk
from .conftest import block_bench, running_disk


@pytest.mark.parametrize(("operation", "state"), PAIRS, ids=lambda value: value.name)
def test_every_pair(bench, operation, state):
    check_pair(bench, operation, state)


def test_random_walks(block_node):
    def started(device, state):
        assert bool(device.status & 4) == (state in (RunState.RUNNING, RunState.SUSPENDED))

    walk(lambda: block_bench(block_node), b"vdpa_blk_sim", check=started)


def test_io_after_random_suspends(block_node):
    """Between random suspends, resumes and resets the data stays right."""
    rng = random.Random(20230413)
    with running_disk(block_node) as (bench, disk):
        device = bench.device
        for _ in range(60):
            for block in rng.sample(range(200), rng.randrange(1, 40)):
                disk.write(block)
            bench.queue.kick()
            if device.state is RunState.RUNNING and rng.random() < 0.5:
                device.suspend()
                if Capability.RESUME in device.capabilities and rng.random() < 0.7:
                    device.resume()
                else:
                    base = device.get_base(0).avail_index
                    device.reset()
                    device.accept_features(bench.features)
                    bench.queue.attach(device, 0, base)
                    device.start()
            disk.settle(disk.driver.drain())
        assert disk.verify() > 100


def test_capabilities_of_the_simulator(bench):
    """Written out, so that a capability that is no longer discovered is noticed."""
    expected = {Capability.SUSPEND, Capability.CONFIG_WRITE, Capability.CONFIG_CALL, Capability.STATE_RESET}
    expected |= since((6, 3), {Capability.RESUME}, before=set())
    expected |= since((6, 6), {Capability.ENABLE_WHILE_RUNNING}, before=set())
    assert bench.device.capabilities == expected


def test_resume_needs_the_bit(bench):
    """Without RESUME (6.1) the error names the way out; with it there is nothing to refuse."""
    bench.reach(RunState.SUSPENDED)
    if Capability.RESUME in bench.device.capabilities:
        bench.device.resume()
        return
    with pytest.raises(MissingCapability, match="replay") as caught:
        bench.device.resume()
    assert caught.value.capability == "RESUME"


def test_suspend_before_start_is_refused(bench):
    """The kernel answers 0 and does nothing; the driver says what is wrong."""
    bench.reach(RunState.CONFIGURED)
    with pytest.raises(StateError, match="not while the device is configured"):
        bench.device.suspend()
