"""The state table on a real device: every pair, and walks of any length that hypothesis thinks of."""

import os
import random
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import sampled_from

from vdpabridge.device import Capability, Operation, RunState
from vdpabridge.errors import MissingCapability, StateError
from vdpabridge.state.replay import resume
from vdpabridge.workload.block import BlockDriver

from ..support.release import since
from ..support.transitions import PAIRS, check_pair, expected
from .conftest import block_bench, running_disk


@pytest.mark.parametrize(("operation", "state"), PAIRS, ids=lambda value: value.name)
def test_every_pair(bench, operation, state):
    check_pair(bench, operation, state)


def test_random_walks(block_node):
    """Any sequence of operations: the table foretells every outcome, and exactly a running device does I/O."""

    class Walk(RuleBasedStateMachine):
        @initialize()
        def open(self):
            self.manager = block_bench(block_node)
            self.bench = self.manager.__enter__()
            self.driver = BlockDriver(self.bench.memory, self.bench.queue)
            self.model = RunState.RESET

        @rule(operation=sampled_from([each for each in Operation if each is not Operation.RESET]))
        def operate(self, operation):
            outcome = expected(self.bench.device, operation, self.model)
            if operation is Operation.START and self.model is RunState.CONFIGURED:
                self.bench.queue.attach(self.bench.device, 0, self.bench.queue.avail_index)
                self.bench.device.set_kick(0, self.bench.queue.kick_fd)
            if isinstance(outcome, RunState):
                self.bench.perform(operation)
                self.model = outcome
            else:
                with pytest.raises(outcome):
                    self.bench.perform(operation)

        @rule()
        def reset(self):
            self.bench.device.reset()
            self.model = RunState.RESET

        @invariant()
        def agrees(self):
            if hasattr(self, "bench"):
                device = self.bench.device
                assert device.state is self.model
                started = self.model in (RunState.RUNNING, RunState.SUSPENDED)
                assert bool(device.status & 4) == started

        @precondition(lambda self: self.model in (RunState.RUNNING, RunState.SUSPENDED))
        @rule()
        def get_id(self):
            """A request is answered by a running device, and by a suspended one only after it goes on."""
            driver = self.driver
            driver.get_id()
            if self.model is RunState.RUNNING:
                assert driver.drain()[-1].data.startswith(b"vdpa_blk_sim")
                return
            self.bench.queue.kick()
            time.sleep(0.002)
            assert driver.done() == []
            resume(self.bench.device)
            self.model = RunState.RUNNING
            assert driver.drain()[-1].data.startswith(b"vdpa_blk_sim")

        def teardown(self):
            if hasattr(self, "manager"):
                self.manager.__exit__(None, None, None)

    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=int(os.environ.get("VDPABRIDGE_EXAMPLES", "12")),
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


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
