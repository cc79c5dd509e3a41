"""Front-ends that hypothesis thinks of, over devices of any abilities: whatever they did before, a ring does its
requests if it is started and enabled, each once, and only then.
"""

import os
import struct
from contextlib import ExitStack

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
from hypothesis.strategies import booleans, integers, lists, sampled_from

from vdpabridge.abi.vhost_user_payloads import VringAddr
from vdpabridge.device import Capability, Operation, RunState
from vdpabridge.drivers.sim import Sim
from vdpabridge.errors import VdpaBridgeError
from vdpabridge.export.vhost_user.frontend_memory import FrontendMemory
from vdpabridge.export.vhost_user.frontend_rings import FrontendRings

from ..support.front_end import MEMORY_BYTES, USER, VERSION_1, one_region
from ..support.transitions import shared_file
from ..support.waiting import wait_until

C = Capability
QUEUES = 3
SIZE = 64
LEAST = frozenset({C.SUSPEND, C.CONFIG_WRITE, C.CONFIG_CALL, C.STATE_RESET})
DEVICES = {
    "6.1": LEAST,
    "6.12": LEAST | {C.RESUME, C.ENABLE_WHILE_RUNNING},
    "RESUME": LEAST | {C.RESUME},
    "state": LEAST | {C.DEVICE_STATE},
    "state, RESUME": LEAST | {C.DEVICE_STATE, C.RESUME},
    "set up while suspended": LEAST | {C.RESUME, C.SETUP_WHILE_SUSPENDED},
    "queues alone": LEAST | {C.RESUME, C.SETUP_WHILE_SUSPENDED, C.QUEUE_CONTROL},
    "state, queues alone": LEAST | {C.RESUME, C.SETUP_WHILE_SUSPENDED, C.QUEUE_CONTROL, C.DEVICE_STATE},
    "everything": frozenset(C),
}
INDEXES = integers(0, QUEUES - 1)
HOOKS = [
    "_reset",
    "_accept_features",
    "_set_queue",
    "_set_base",
    "_get_base",
    "_bind_eventfd",
    "_enable_queue",
    "_start",
    "_resume",
    "_suspend",
    "_set_state_fd",
    "_check_state",
]


def with_accidents(device_class):
    """Devices to which something happens when ``accident`` says so: (hook, whether it is done all the same)."""

    def hook(name):
        def wrapped(self, *words, **options):
            accident, self.accident = (
                self.accident,
                None if self.accident and self.accident[0] == name else self.accident,
            )
            mine = accident if accident is not None and accident[0] == name else None
            if mine is not None and not mine[1]:
                if name == "_set_state_fd":
                    os.close(words[-1])
                raise VdpaBridgeError(name, device=self.name, why="a test forbids it")
            result = getattr(super(Accidental, self), name)(*words, **options)
            if mine is not None:
                raise VdpaBridgeError(name, device=self.name, why="a test lets it fail late")
            return result

        return wrapped

    class Accidental(device_class):
        accident = None

    for name in HOOKS:
        setattr(Accidental, name, hook(name))
    return Accidental


class RingOfGuest:
    """What a front-end knows of a ring, and the guest's driver, whose every request is the same chain."""

    def __init__(self, file, index):
        self.file = file
        self.place = 0x10000 * index
        self.guest = one_region()[0].guest_address + self.place
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.started = self.enabled = self.decided = False
        self.clear()

    def clear(self):
        """As a driver does that begins anew."""
        self.base = self.submitted = self.used_when_left = 0
        os.pwrite(self.file, bytes(0x3000), self.place)
        os.pwrite(self.file, struct.pack("<QIHH", self.guest + 0x8000, 16, 1, 1), self.place)
        os.pwrite(self.file, struct.pack("<QIHH", self.guest + 0x9000, 1, 2, 0), self.place + 16)

    @property
    def wanted(self):
        return self.started and self.enabled

    @property
    def used(self):
        return struct.unpack("<H", os.pread(self.file, 2, self.place + 0x2002))[0]

    def submit(self):
        self.submitted += 1
        os.pwrite(self.file, struct.pack("<H", self.submitted), self.place + 0x1002)
        os.eventfd_write(self.kick, 1)


def front_ends(capabilities):
    """The machine for a device of ``capabilities``."""

    class Lesser(Sim):
        pass

    Lesser.capabilities = capabilities
    device_class = with_accidents(Lesser)

    class FrontEnds(RuleBasedStateMachine):
        @initialize()
        def arrive(self):
            self.stack = ExitStack()
            self.file = self.stack.enter_context(shared_file(MEMORY_BYTES))
            self.device = self.stack.enter_context(device_class.blk(1 << 20, queue_count=QUEUES, timeout_s=5))
            self.memory = FrontendMemory(self.device)
            self.books = FrontendRings(self.device, self.memory)
            self.stack.callback(lambda: self.books.close())
            self.guest = [RingOfGuest(self.file, index) for index in range(QUEUES)]
            for each in self.guest:
                self.stack.callback(os.close, each.kick)
            self.device.accept_features(VERSION_1)
            self.books.features = VERSION_1
            self.device.model.write_config(32, b"\0")
            self.memory.replace(one_region(), [self.file])
            self.mapped, self.held = True, False
            self.settled = False
            """Whether every ring that is wanted is at work."""
            self.ending = False
            """Whether a ring was stopped and the device with it, and none was started or enabled since."""

        # --- what front-ends do ---

        def set_up(self, index):
            place, guest = USER + 0x10000 * index, self.guest[index]
            self.books.set_size(index, SIZE)
            self.books.set_base(index, guest.base)
            self.books.set_address(index, VringAddr(index, 0, place, place + 0x2000, place + 0x1000, 0))
            self.books.set_eventfd(Operation.SET_KICK, index, os.dup(guest.kick))
            guest.started, self.ending = True, False
            if not guest.decided and self.device.state is not RunState.RUNNING:
                # it may be waited for
                self.settled = False

        @precondition(lambda self: self.mapped)
        @rule(index=INDEXES)
        def start(self, index):
            if not self.guest[index].started:
                self.set_up(index)

        @rule(index=INDEXES, enabled=booleans())
        def enable(self, index, enabled):
            self.only_wanted_rings_are_at_work()
            self.guest[index].enabled, self.guest[index].decided = enabled, True
            self.ending = self.ending and not enabled
            self.books.enable(index, enabled)

        @rule(index=INDEXES)
        def stop(self, index):
            self.only_wanted_rings_are_at_work()
            guest, stops = self.guest[index], self.device.state is RunState.RUNNING and self.guest[index].started
            position = self.books.stop(index, drain=True)
            assert position == guest.used, "it is done with what it took, and with nothing else"
            guest.base, guest.started = position, False
            if not guest.enabled:
                guest.decided = False
            if C.QUEUE_CONTROL not in capabilities and stops:
                self.settled, self.ending = False, True

        @precondition(lambda self: self.mapped)
        @rule(enabled=lists(booleans(), min_size=QUEUES, max_size=QUEUES))
        def begin(self, enabled):
            """As QEMU does, from wherever it is: every ring is set up, then every ring is enabled or disabled."""
            for index in range(QUEUES):
                self.start(index)
            for index in range(QUEUES):
                self.enable(index, enabled[index])
            self.settled = not self.held

        @rule()
        def end(self):
            """As QEMU does."""
            for index in range(QUEUES):
                self.enable(index, False)
            for index in range(QUEUES):
                self.stop(index)
            assert self.device.state is not RunState.RUNNING

        @rule(index=INDEXES)
        def submit(self, index):
            self.guest[index].submit()

        @rule(index=INDEXES)
        def change_the_kick(self, index):
            """Another descriptor of the same eventfd."""
            if self.guest[index].started:
                self.books.set_eventfd(Operation.SET_KICK, index, os.dup(self.guest[index].kick))

        @rule()
        def reset(self):
            """RESET_DEVICE. A hold lasts."""
            self.device.reset()
            self.books.forget()
            self.device.accept_features(VERSION_1)
            self.books.features = VERSION_1
            for each in self.guest:
                each.started = each.enabled = each.decided = False
                each.clear()
            self.settled = self.ending = False
            self.held = self.books.held
            self.device.model.write_config(32, b"\0")

        @rule()
        def be_silent(self):
            """For longer than the device waits for what is said of other rings."""
            self.only_wanted_rings_are_at_work()
            if self.books.waiting:
                self.books.wait_no_longer()
                for each in self.guest:
                    each.decided = True
                self.settled = self.mapped and not self.held and not self.ending

        # --- what goes on besides ---

        @precondition(lambda self: self.mapped and self.device.state is not RunState.FAILED)
        @rule()
        def take_memory(self):
            region = one_region()[0]
            if self.books.lie_in([region]):
                self.books.suspend()
            self.memory.remove(region)
            self.books.go_on()
            self.mapped = False

        @precondition(lambda self: not self.mapped)
        @rule()
        def give_memory(self):
            self.memory.add(one_region()[0], self.file)
            self.books.go_on()
            self.mapped = True

        @rule()
        def hold(self):
            self.books.hold()
            self.held = True

        @precondition(lambda self: self.held)
        @rule()
        def release(self):
            self.books.release()
            self.held = False

        @precondition(lambda self: not self.held)
        @rule(hook=sampled_from(HOOKS), late=booleans())
        def hold_with_an_accident(self, hook, late):
            """As the server does: where it fails, it lets go again."""
            self.only_wanted_rings_are_at_work()
            self.device.accident = (hook, late)
            try:
                self.books.hold()
                self.held = True
            except VdpaBridgeError:
                self.held = True
                self.let_go()
            self.device.accident = None

        @precondition(lambda self: self.held)
        @rule(hook=sampled_from(HOOKS), late=booleans())
        def release_with_an_accident(self, hook, late):
            self.device.accident = (hook, late)
            self.let_go()
            self.device.accident = None

        def let_go(self):
            self.settled = False
            try:
                self.books.release()
            except VdpaBridgeError:
                self.device.accident = None
                if self.books.lost:
                    self.hang_up()
            self.held = self.books.held

        def hang_up(self):
            """Another front-end, and a device that was reset."""
            self.books.close()
            self.books = FrontendRings(self.device, self.memory)
            self.reset()

        # --- what must be so ---

        @invariant()
        def only_wanted_rings_are_at_work(self):
            if not hasattr(self, "guest"):
                return
            at_work = self.at_work()
            # one that failed late runs until it is asked for again
            assert not (self.held and self.device.state is RunState.RUNNING and not self.books._due)
            wanted = {index for index, guest in enumerate(self.guest) if guest.wanted}
            assert at_work <= wanted
            if self.mapped and not self.held:
                if self.settled:
                    assert at_work == wanted
                if wanted and not self.ending and self.device.state is not RunState.RUNNING:
                    assert not all(guest.decided for guest in self.guest if guest.started), (
                        "there is nothing to wait for"
                    )
            for index, guest in enumerate(self.guest):
                if index in at_work:
                    wait_until(lambda guest=guest: guest.used == guest.submitted)
                    guest.used_when_left = guest.used
                assert guest.used == guest.used_when_left, "nobody may look into it"

        def at_work(self):
            """The rings that the device hears of."""
            device = self.device
            return {
                index
                for index, worker in device._engine.workers.items()
                if device.state is RunState.RUNNING
                and worker.enabled
                and (index, Operation.SET_KICK) in device._eventfds
            }

        @invariant()
        def the_device_remembers(self):
            if C.DEVICE_STATE in capabilities and hasattr(self, "guest"):
                assert self.device.read_config(32, 1) == b"\0"

        def teardown(self):
            if hasattr(self, "stack"):
                self.stack.close()

    return FrontEnds


@pytest.mark.parametrize("name", DEVICES)
def test_front_ends_of_any_kind(name):
    run_state_machine_as_test(
        front_ends(DEVICES[name]),
        settings=settings(
            max_examples=int(os.environ.get("VDPABRIDGE_EXAMPLES", "25")),
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
