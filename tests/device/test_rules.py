"""The table itself: complete, consistent, and with a way out of everything that may be missing."""

import pytest

from vdpabridge.device import Device
from vdpabridge.device.rules import ALTERNATIVES, RULES, Capability, Operation, RunState, permit
from vdpabridge.errors import MissingCapability, StateError

EVERYTHING = frozenset(Capability)


def test_every_operation_has_a_rule_and_every_capability_a_way_out():
    assert set(RULES) == set(Operation)
    assert set(ALTERNATIVES) == set(Capability)


def test_a_failed_device_can_only_be_reset():
    legal = {operation for operation, rule in RULES.items() if RunState.FAILED in rule.leads}
    assert legal == {Operation.RESET}
    assert set(RULES[Operation.RESET].leads) == set(RunState)


def test_every_state_but_failed_is_reachable():
    reached = {RunState.RESET}
    while more := {to for rule in RULES.values() for start, to in rule.leads.items() if start in reached} - reached:
        reached |= more
    assert reached == set(RunState) - {RunState.FAILED}


# (operation, from, to): the edges that change state, written out
EDGES = {
    (Operation.ACCEPT_FEATURES, RunState.RESET, RunState.CONFIGURED),
    (Operation.START, RunState.CONFIGURED, RunState.RUNNING),
    (Operation.SUSPEND, RunState.RUNNING, RunState.SUSPENDED),
    (Operation.RESUME, RunState.SUSPENDED, RunState.RUNNING),
    *((Operation.RESET, state, RunState.RESET) for state in RunState if state is not RunState.RESET),
}


def test_edges():
    assert {
        (op, start, to) for op, rule in RULES.items() for start, to in rule.leads.items() if start is not to
    } == EDGES


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("state", RunState)
def test_permit(operation, state):
    leads = RULES[operation].leads
    if state in leads:
        assert permit("d0", operation, state, EVERYTHING) is leads[state]
    else:
        with pytest.raises(
            StateError, match=rf"^d0: {operation.value}: not while the device is {state.value} \(only while it is "
        ):
            permit("d0", operation, state, EVERYTHING)


@pytest.mark.parametrize("operation", [operation for operation, rule in RULES.items() if rule.needs])
def test_what_is_missing_is_said_before_the_state_is_looked_at(operation):
    needed = RULES[operation].needs
    for state in RunState:
        with pytest.raises(MissingCapability) as caught:
            permit("d0", operation, state, EVERYTHING - {needed})
        assert caught.value.capability == needed.value
        assert caught.value.hint == ALTERNATIVES[needed]


def test_every_operation_is_a_method_of_the_device():
    names = {operation.name.lower() for operation in Operation}
    assert {name for name in names if callable(getattr(Device, name, None))} == names
