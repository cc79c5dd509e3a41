"""Walks through the state table of any length that hypothesis thinks of, the same for every driver."""

import os
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

from vdpabridge.device import Operation, RunState
from vdpabridge.guest.block import BlockDriver
from vdpabridge.state.replay import resume

from .transitions import expected


def walk(bench, disk_name, *, examples=12, check=lambda device, state: None):
    """Any sequence of operations on a disk: the table foretells every outcome, and exactly a running device does I/O.

    ``bench()`` is a context manager that gives a `Bench`; ``check(device, state)`` may look further after each step.
    """

    class Walk(RuleBasedStateMachine):
        @initialize()
        def open(self):
            self.manager = bench()
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
                if operation is Operation.STOP_QUEUE:
                    self.stop_and_go_on()
                    return
                self.bench.perform(operation)
                self.model = outcome
            else:
                with pytest.raises(outcome):
                    self.bench.perform(operation)

        def stop_and_go_on(self):
            """A queue that is stopped alone, and started again where it stood."""
            base = self.bench.device.stop_queue(0)
            self.bench.device.set_base(0, base)
            self.bench.device.enable_queue(0)

        @rule()
        def reset(self):
            self.bench.device.reset()
            self.model = RunState.RESET

        @invariant()
        def agrees(self):
            if hasattr(self, "bench"):
                assert self.bench.device.state is self.model
                check(self.bench.device, self.model)

        @precondition(lambda self: self.model in (RunState.RUNNING, RunState.SUSPENDED))
        @rule()
        def get_id(self):
            """A request is answered by a running device, and by a suspended one only after it goes on."""
            driver = self.driver
            if self.model is RunState.SUSPENDED:
                # whatever was told to the queue meanwhile, it goes on where the ring stands
                base = self.bench.queue.avail_index
                driver.get_id()
                self.bench.queue.kick()
                time.sleep(0.002)
                assert driver.done() == []
                self.go_on(base)
            else:
                driver.get_id()
            assert driver.drain()[-1].data.startswith(disk_name)

        def go_on(self, base):
            if "SETUP_WHILE_SUSPENDED" in {each.value for each in self.bench.device.capabilities}:
                self.bench.queue.attach(self.bench.device, 0, base)
            resume(self.bench.device)
            self.model = RunState.RUNNING

        def teardown(self):
            if hasattr(self, "manager"):
                self.manager.__exit__(None, None, None)

    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=int(os.environ.get("VDPABRIDGE_EXAMPLES", str(examples))),
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
