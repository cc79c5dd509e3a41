"""What the kernel and the device have mapped, when messages are late, interrupted or refused.

Enumerated: at every message of an operation, before and after the kernel has done it. Whatever happens, the next
operation leaves the kernel, the device and our books with the same entries.
"""

import itertools
import threading
from contextlib import contextmanager
from dataclasses import replace
from errno import EFAULT, EIO

import pytest

from vdpabridge.abi.vhost_user_payloads import MemoryTable, SingleRegion
from vdpabridge.device import MemoryRegion, RunState
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import DeadlineExceeded, DeviceFailed, FeatureError, KernelError, StateError, VdpaBridgeError
from vdpabridge.guest.memory import GuestMemory

from ..support.fake_kernel import FakeKernel, Parent
from ..support.front_end import MEMORY_BYTES, F, FrontEnd, one_region
from ..support.pair import served
from ..support.transitions import shared_file
from ..support.waiting import wait_until

NODE = "/dev/vhost-vdpa-0"
PAGE = 4096


class Late(FakeKernel):
    """Its ``at``-th IOTLB message, counted from `arm`, lasts until `release`, before or after it is done; or ends by
    an exception."""

    at = 0
    after = False
    error = None
    gate, waits = threading.Event(), threading.Event()

    def arm(self, at, *, after, error=None):
        self.at, self.after, self.error = at, after, error
        self.gate, self.waits = threading.Event(), threading.Event()

    def disarm(self):
        self.at = 0

    def write(self, fd, data):
        self.at -= 1
        if self.at == 0 and not self.after:
            self._go_wrong()
        result = super().write(fd, data)
        if self.at == 0 and self.after:
            self._go_wrong()
        return result

    def _go_wrong(self):
        if self.error is not None:
            raise self.error
        self.waits.set()
        self.gate.wait(10)


@contextmanager
def opened(kernel):
    with GuestMemory(64 * PAGE) as memory, VhostVdpa.open(NODE, system=kernel, timeout_s=5) as device:
        yield device, [MemoryRegion(0x10_0000 * number, PAGE, memory.fileno(), PAGE * number) for number in range(1, 5)]


def check_agreement(kernel, device):
    """The three of them, and no batch is left open."""
    wanted = {region.guest_address: region.size_bytes for region in device.regions}
    assert kernel.in_batch is None
    assert kernel.iotlb.get(0, {}) == wanted
    assert kernel.device_maps.get(0, {}) == wanted
    assert device.iotlb.entries == {(0, address): size for address, size in wanted.items()}
    assert not device.iotlb.in_doubt


def map_three(device, regions):
    device.map(regions[:3])


def map_one(device, regions):
    device.map(regions[:1])


def unmap_two(device, regions):
    device.unmap(regions[:2])


def unmap_one(device, regions):
    device.unmap(regions[:1])


#: Operation -> how many regions are mapped before it.
OPERATIONS = {map_three: 0, map_one: 0, unmap_two: 3, unmap_one: 1}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_a_message_that_is_late(operation, after):
    at, timeout_s = 1, 0.03
    while True:
        kernel = Late(Parent())
        with opened(kernel) as (device, regions):
            if OPERATIONS[operation]:
                device.map(regions[: OPERATIONS[operation]])
            kernel.arm(at, after=after)
            device.timeout_s = timeout_s
            try:
                operation(device, regions)
                kernel.disarm()
                assert at > 1
                check_agreement(kernel, device)
                return
            except DeadlineExceeded:
                if not kernel.waits.is_set():
                    # this machine was late, and no message
                    kernel.gate.set()
                    timeout_s *= 2
                    continue
            with pytest.raises(DeadlineExceeded, match="still in the kernel"):
                device.map(regions[3:])
            kernel.gate.set()
            wait_until(lambda: not device._node.stuck)
            device.timeout_s = 5
            device.map(regions[3:])
            check_agreement(kernel, device)
            # and all that is not mapped can be
            mapped = {region.guest_address for region in device.regions}
            device.map([region for region in regions if region.guest_address not in mapped])
            device.unmap(device.regions)
            check_agreement(kernel, device)
        at += 1


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("timeout_s", [None, 5])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_an_interruption(operation, timeout_s, after):
    for at in itertools.count(1):
        kernel = Late(Parent())
        with opened(kernel) as (device, regions):
            if OPERATIONS[operation]:
                device.map(regions[: OPERATIONS[operation]])
            device.timeout_s = timeout_s
            kernel.arm(at, after=after, error=KeyboardInterrupt())
            try:
                operation(device, regions)
                kernel.disarm()
                assert at > 1
                return
            except KeyboardInterrupt:
                pass
            device.map(regions[3:])
            check_agreement(kernel, device)


@pytest.mark.parametrize("operation", [map_three, map_one], ids=lambda each: each.__name__)
def test_a_refusal_leaves_nothing(operation):
    for at in itertools.count(1):
        kernel = Late(Parent())
        with opened(kernel) as (device, regions):
            kernel.arm(at, after=False, error=OSError(EFAULT, "Bad address"))
            refused = None
            try:
                operation(device, regions)
            except KernelError as error:
                refused = error.errno
            kernel.disarm()
            if refused is None:
                return
            assert refused == EFAULT
            device.map(regions[3:])
            check_agreement(kernel, device)


def test_what_cannot_be_put_right_is_a_failure():
    kernel = Late(Parent())
    with opened(kernel) as (device, regions):
        kernel.arm(3, after=True)
        device.timeout_s = 0.2
        with pytest.raises(DeadlineExceeded):
            device.map(regions[:3])
        kernel.gate.set()
        wait_until(lambda: not device._node.stuck)
        kernel.arm(1, after=False, error=OSError(EIO, "Input/output error"))
        device.timeout_s = 5
        with pytest.raises(DeviceFailed, match=r"it is not known what is mapped.*EIO"):
            device.map(regions[3:])
        assert device.state is RunState.FAILED


def test_memory_stays_mapped_in_this_process_while_the_kernel_may_look_it_up():
    """What came to lie at its address would be pinned instead, and written by the device."""
    kernel = Late(Parent())
    with opened(kernel) as (device, regions):
        kernel.arm(2, after=False)
        device.timeout_s = 0.2
        before = mapped_bytes()
        with pytest.raises(DeadlineExceeded):
            device.map(regions[:3])
        assert mapped_bytes() == before + PAGE
        kernel.gate.set()
        wait_until(lambda: not device._node.stuck)
        device.timeout_s = 5
        device.map(regions[3:])
        device.unmap(regions[3:])
        assert mapped_bytes() == before


def mapped_bytes():
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        spans = [line.split()[0].split("-") for line in maps if "memfd:" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


def test_the_device_takes_in_all_changes_at_once():
    """mlx5 makes its whole memory key anew each time."""
    kernel = FakeKernel(Parent(persist=False))
    with opened(kernel) as (device, regions):
        device.map(regions)
        assert kernel.set_map_count == 1
        device.unmap(regions[:2])
        assert kernel.set_map_count == 2
        device.accept_features(1 << 32)
        device.reset()
        assert kernel.set_map_count == 3
        check_agreement(kernel, device)
        device.unmap(regions[2:3])
        device.map(regions[:1])
        assert kernel.set_map_count == 5


def test_features_after_a_negotiation_that_was_late():
    """The device is past its reset then, although nobody was told."""
    kernel = FakeKernel(Parent(), hang_on="VHOST_SET_FEATURES")
    with opened(kernel) as (device, _):
        device.timeout_s = 0.2
        with pytest.raises(DeadlineExceeded):
            device.accept_features(1 << 32)
        assert (device.state, kernel.status) == (RunState.RESET, 3)
        kernel.release.set()
        wait_until(lambda: not device._node.stuck)
        kernel.hang_on = None
        device.timeout_s = 5
        device.accept_features(1 << 32)
        assert (device.state, kernel.status) == (RunState.CONFIGURED, 11)


@pytest.mark.parametrize("parent", [Parent(persist=False, forgets_maps=True), Parent()], ids=["forgets", "keeps"])
@pytest.mark.parametrize("wrong", ["late", "interrupted", "refused"])
@pytest.mark.parametrize("by", ["reset", "refused features"])
def test_a_reset_that_is_not_seen_to_its_end(by, wrong, parent):
    """The device is reset then, and lacks memory: it has failed, until another reset gives it all."""
    errors = {"late": None, "interrupted": KeyboardInterrupt(), "refused": OSError(EFAULT, "Bad address")}
    for at in itertools.count(1):
        kernel = Late(replace(parent))
        with opened(kernel) as (device, regions):
            device.map(regions[:3])
            if by == "reset":
                device.accept_features(1 << 32)
            else:
                kernel.parent.refuses_features_ok = True
            kernel.arm(at, after=False, error=errors[wrong])
            if wrong == "late":
                device.timeout_s = 0.2
            try:
                device.reset() if by == "reset" else device.accept_features(1 << 32)
                met = False
            except FeatureError:
                met = False
            except (VdpaBridgeError, KeyboardInterrupt):
                met = True
            kernel.disarm()
            kernel.gate.set()
            wait_until(lambda: not device._node.stuck)
            device.timeout_s = 5
            kernel.parent.refuses_features_ok = False
            assert device.state is (RunState.FAILED if met else RunState.RESET)
            if met:
                with pytest.raises(StateError):
                    device.start()
                device.reset()
            device.accept_features(1 << 32)
            device.start()
            check_agreement(kernel, device)
            assert len(device.regions) == 3
        if not met:
            assert at > 1 or parent.persist
            return


@pytest.mark.parametrize("request_", [F.SET_MEM_TABLE, F.REM_MEM_REG], ids=lambda each: each.name)
def test_an_exporter_whose_unmap_was_late_knows_what_is_mapped(request_):
    kernel = Late(Parent())
    one, two = one_region(2)
    with (
        shared_file(MEMORY_BYTES) as first,
        shared_file(MEMORY_BYTES) as second,
        VhostVdpa.open(NODE, system=kernel, timeout_s=0.2) as device,
        served(device) as ours,
    ):
        front = FrontEnd(ours, device)
        front.negotiate(front.number(F.GET_PROTOCOL_FEATURES))
        whole = MemoryTable((one, two)).pack()
        assert front.tell(F.SET_MEM_TABLE, whole, [first, second]) == 0
        kernel.arm(1, after=False)
        if request_ is F.REM_MEM_REG:
            assert front.tell(request_, SingleRegion(two).pack()) == 1
        else:
            assert front.tell(request_, MemoryTable((one,)).pack(), [first]) == 1
        kernel.disarm()
        kernel.gate.set()
        wait_until(lambda: not device._node.stuck)
        assert front.tell(F.SET_MEM_TABLE, whole, [first, second]) == 0
        assert len(device.regions) == len(kernel.iotlb[0]) == 2
        assert front.tell(F.REM_MEM_REG, SingleRegion(two).pack()) == 0
        assert front.tell(F.ADD_MEM_REG, SingleRegion(two).pack(), [second]) == 0
        check_agreement(kernel, device)


def test_an_unmap_behind_one_that_was_late():
    """The second is not even asked for, and its memory goes all the same."""
    kernel = Late(Parent())
    with opened(kernel) as (device, regions):
        device.map(regions[:2])
        kernel.arm(1, after=False)
        device.timeout_s = 0.2
        for region in regions[:2]:
            with pytest.raises(DeadlineExceeded):
                device.unmap([region])
        assert device.regions == []
        kernel.gate.set()
        wait_until(lambda: not device._node.stuck)
        device.timeout_s = 5
        device.map(regions[2:3])
        check_agreement(kernel, device)
        device.map(regions[:2])
        check_agreement(kernel, device)


def test_a_device_that_lost_its_features_does_not_start():
    """Its reset was interrupted when the kernel had done it, and nobody took notice."""

    class Interrupting(FakeKernel):
        def vhost_vdpa_set_status(self, argument):
            code = super().vhost_vdpa_set_status(argument)
            if argument[0] == 0 and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return code

    kernel = Interrupting(Parent(persist=False, forgets_maps=True))
    kernel.interrupted = False
    with opened(kernel) as (device, regions):
        device.map(regions[:3])
        device.accept_features(1 << 32)
        with pytest.raises(KeyboardInterrupt):
            device.reset()
        # and it took no notice of the failure either
        device._state = RunState.CONFIGURED
        with pytest.raises(DeviceFailed, match="status is reset, but features were accepted"):
            device.start()
        device.reset()
        device.accept_features(1 << 32)
        device.start()
        check_agreement(kernel, device)
