"""What each in-tree parent does differently from the simulator, row by row, on a fake kernel.

Source: the parents' vdpa_config_ops in drivers/vdpa at 7.2, and whether they have .get_backend_features (bit 6: mlx5,
vdpa_sim), .get_vq_group, .get_vq_desc_group, .compat_reset. There is no hardware here.
"""

from contextlib import contextmanager
from dataclasses import replace
from errno import EOPNOTSUPP

import pytest

from vdpabridge.device import Capability, Operation, PackedBase, QueueSetup, RunState, SplitBase
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.errors import FeatureError, KernelError, MissingCapability, StateError
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue
from vdpabridge.state.replay import ReplayFailed, resume

from ..support.fake_kernel import FakeKernel, Parent
from ..support.transitions import PAIRS, Bench, check_pair

NODE = "/dev/vhost-vdpa-0"
NO, REFUSES = "no", "refuses"

#: mlx5_vnet.c, mlx5_vdpa_get_vq_group and mlx5_vdpa_get_vq_desc_group: the control queue has a group of its own.
MLX5_GROUPS = ((0, 2), (0, 2), (1, 1))

PARENTS = {
    "vdpa_sim": Parent(forgets_maps=True),
    "mlx5, firmware with freeze_to_rdy": Parent(
        device_id=1, queues=3, descriptor_groups=True, address_spaces=2, groups=MLX5_GROUPS, forgets_maps=True
    ),
    "mlx5, older firmware": Parent(
        device_id=1, queues=3, resume=NO, address_spaces=2, groups=((0, 0), (0, 0), (1, 1)), forgets_maps=True
    ),
    "snet": Parent(enable_after_driver_ok=False),
    "snet, old firmware": Parent(
        suspend=REFUSES,
        resume=REFUSES,
        get_base="unsupported",
        set_base="initial-only",
        enable_after_driver_ok=False,
    ),
    "ifcvf": Parent(suspend=NO, resume=NO, enable_after_driver_ok=False, queue_sizes=True),
    "pds": Parent(device_id=1, suspend=NO, resume=NO, get_base="while-disabled", enable_after_driver_ok=False),
    "octeon_ep": Parent(device_id=1, suspend=NO, resume=NO, enable_after_driver_ok=False),
    "vp_vdpa": Parent(
        device_id=26,
        suspend=NO,
        resume=NO,
        get_base="unsupported",
        set_base="initial-only",
        enable_after_driver_ok=False,
        queue_sizes=True,
    ),
    "eni": Parent(
        device_id=1,
        suspend=NO,
        resume=NO,
        get_base="unsupported",
        set_base="initial-only",
        enable_after_driver_ok=False,
        queue_sizes=True,
    ),
    "VDUSE": Parent(device_id=26, suspend=NO, resume=NO, persist=False, enable_after_driver_ok=False),
}


@contextmanager
def opened(parent, **options):
    kernel = FakeKernel(parent)
    with VhostVdpa.open(NODE, system=kernel, **options) as device:
        yield kernel, device


@contextmanager
def bench_of(parent):
    """A `Bench` on a fake kernel, in run state RESET."""
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened(parent) as (_, device):
        device.map([memory.region])
        yield Bench(device, memory, queue, 1 << 32)


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS.keys())
def test_capabilities_come_from_the_bits(parent):
    with opened(parent) as (_, device):
        assert (Capability.SUSPEND in device.capabilities) == (parent.suspend != NO)
        assert (Capability.RESUME in device.capabilities) == (parent.resume != NO)
        assert (Capability.ENABLE_WHILE_RUNNING in device.capabilities) == parent.enable_after_driver_ok
        assert Capability.DEVICE_STATE not in device.capabilities


def _has_a_row_of_its_own(parent, operation, state):
    """What the table cannot foretell: the parent refuses though the feature bits promise."""
    return (
        (state is RunState.SUSPENDED and parent.suspend != "yes")
        or (operation is Operation.SUSPEND and parent.suspend == REFUSES)
        or (operation is Operation.GET_BASE and parent.get_base == "unsupported")
    )


CASES = [
    pytest.param(parent, operation, state, id=f"{name}-{operation.name}-{state.name}")
    for name, parent in PARENTS.items()
    for operation, state in PAIRS
    if not _has_a_row_of_its_own(parent, operation, state)
]


@pytest.mark.parametrize(("parent", "operation", "state"), CASES)
def test_state_table(parent, operation, state):
    """The same table and the same test as on a real kernel, for every parent."""
    with bench_of(parent) as bench:
        check_pair(bench, operation, state)


@pytest.mark.parametrize("name", ["ifcvf", "pds", "octeon_ep", "vp_vdpa", "eni", "VDUSE"])
def test_a_parent_that_cannot_suspend(name):
    with bench_of(PARENTS[name]) as bench:
        bench.reach(RunState.RUNNING)
        with pytest.raises(MissingCapability, match="only a reset stops this device"):
            bench.device.suspend()
        assert bench.device.state is RunState.RUNNING


def test_a_parent_that_offers_suspend_and_refuses_it():
    """snet with old firmware: an op that is there says no more than that it may work."""
    with bench_of(PARENTS["snet, old firmware"]) as bench:
        bench.reach(RunState.RUNNING)
        with pytest.raises(KernelError, match="EOPNOTSUPP: this device cannot suspend") as caught:
            bench.device.suspend()
        assert caught.value.errno == EOPNOTSUPP
        assert bench.device.state is RunState.RUNNING


@pytest.mark.parametrize("parent", ["vp_vdpa", "eni"])
def test_bases_that_nobody_knows(parent):
    with bench_of(PARENTS[parent]) as bench:
        bench.reach(RunState.CONFIGURED)
        with pytest.raises(KernelError, match="cannot say where its queues stand") as caught:
            bench.device.get_base(0)
        assert (caught.value.errno, caught.value.queue) == (EOPNOTSUPP, 0)


def test_pds_answers_for_a_queue_that_is_not_enabled():
    """Queues are enabled at start(), so before it the parent answers; afterwards the table does not let it be asked."""
    with bench_of(PARENTS["pds"]) as bench:
        bench.reach(RunState.CONFIGURED)
        assert bench.device.get_base(0) == SplitBase(0)
        bench.device.start()
        with pytest.raises(StateError):
            bench.device.get_base(0)


@pytest.mark.parametrize("parent", ["vp_vdpa", "eni"])
def test_only_the_initial_base_can_be_set(parent):
    with opened(PARENTS[parent]) as (_, device):
        device.accept_features(1 << 32)
        device.set_base(0, SplitBase(0))
        with pytest.raises(KernelError, match="only start a queue at its beginning") as caught:
            device.set_base(0, SplitBase(7))
        assert caught.value.errno == EOPNOTSUPP


def test_resume_falls_back_to_replay():
    """mlx5 before freeze_to_rdy: suspends, and comes back by reset with bases, eventfds and enables as they were."""
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 64) as queue,
        opened(PARENTS["mlx5, older firmware"]) as (kernel, device),
    ):
        device.accept_features(1 << 32)
        device.set_config_call(queue.call_fd)
        queue.attach(device, 1, 41)
        device.start()
        device.suspend()
        kernel.bases[1] = 99
        kernel.log.clear()
        assert resume(device) is None
        assert device.state is RunState.RUNNING
        assert kernel.bases[1] == 99
        assert kernel.enabled[1]
        assert kernel.eventfds["config"] >= 0
        assert "VHOST_VDPA_RESUME" not in kernel.log
        assert kernel.log.index("VHOST_SET_VRING_BASE") < kernel.log.index("VHOST_VDPA_SET_VRING_ENABLE")


def test_a_replay_that_fails_hands_the_positions_over():
    """They are in the error: the device was reset, and nobody else knows them."""
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 64) as queue,
        opened(PARENTS["mlx5, older firmware"]) as (kernel, device),
    ):
        device.accept_features(1 << 32)
        queue.attach(device, 1)
        device.start()
        device.suspend()
        kernel.bases[1] = 99
        kernel.parent = PARENTS["vp_vdpa"]
        kernel.vhost_get_vring_base = lambda argument: kernel._put(argument, "II", 1, 99)
        with pytest.raises(ReplayFailed, match="only start a queue at its beginning") as caught:
            resume(device)
        assert caught.value.snapshot.queues[1].base == SplitBase(99)


def test_groups_are_assigned_with_the_queues_and_again_by_a_replay():
    parent = PARENTS["mlx5, older firmware"]
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened(parent) as (kernel, device):
        device.accept_features(1 << 32)
        queue.attach(device, 2, address_space=1)
        assert kernel.group_spaces == {1: 1}
        device.start()
        device.suspend()
        resume(device)
        assert kernel.group_spaces == {1: 1}


def test_the_rings_of_a_queue_go_where_its_buffers_are():
    """mlx5 looks them up in the space of their own group, which is 0 unless somebody says otherwise."""
    with opened(PARENTS["mlx5, firmware with freeze_to_rdy"]) as (kernel, device):
        device.accept_features(1 << 32)
        device.set_queue(0, QueueSetup(16, 0x1000, 0x2000, 0x3000, address_space=1))
        assert kernel.group_spaces == {0: 1, 2: 1}
        with pytest.raises(ValueError, match="queue 0, of the same group, is in address space 1"):
            device.set_queue(1, QueueSetup(16, 0x1000, 0x2000, 0x3000))
        device.set_queue(2, QueueSetup(16, 0x1000, 0x2000, 0x3000))
        assert kernel.group_spaces == {0: 1, 1: 0, 2: 1}


def test_hundreds_of_queues_take_hundreds_of_requests():
    count = 256
    parent = Parent(device_id=1, queues=count, address_spaces=2, descriptor_groups=True, groups=((0, 1),) * count)
    with opened(parent) as (kernel, device):
        device.accept_features(1 << 32)
        kernel.log.clear()
        for index in [*range(count), *range(count)]:
            device.set_queue(index, QueueSetup(16, 0x1000, 0x2000, 0x3000))
        assert kernel.log.count("VHOST_VDPA_GET_VRING_GROUP") == count
        assert kernel.log.count("VHOST_VDPA_GET_VRING_DESC_GROUP") == count
        assert kernel.log.count("VHOST_VDPA_SET_GROUP_ASID") == 2
        device.reset()
        device.accept_features(1 << 32)
        device.set_queue(0, QueueSetup(16, 0x1000, 0x2000, 0x3000))
        assert kernel.log.count("VHOST_VDPA_SET_GROUP_ASID") == 4, "a reset undoes it"


def test_a_feature_that_is_not_offered_cannot_be_accepted():
    """ACCESS_PLATFORM, which vhost-vdpa always needs and a guest never sees: a replay would not find it again."""
    with opened(Parent()) as (kernel, device):
        assert not device.offered_features >> 33 & 1
        with pytest.raises(FeatureError, match="0x200000000 are not offered"):
            device.accept_features(1 << 32 | 1 << 33)
        device.accept_features(1 << 32)
        assert kernel.driver_features >> 33 & 1


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS.keys())
def test_mappings_outlive_a_reset_on_every_parent(parent):
    with GuestMemory(1 << 20) as memory, opened(parent, backend_features=~(1 << 8)) as (kernel, device):
        device.map([memory.region])
        device.accept_features(1 << 32)
        device.reset()
        assert kernel.device_maps == {0: {memory.guest_address: memory.size_bytes}}


@pytest.mark.parametrize(
    ("parent", "words"),
    [
        (Parent(), "no address space 1: the device has 1, numbered from 0"),
        (Parent(address_spaces=2, groups=((0, 0), (0, 0))), "address space 1 for queue 0: all its queues are in 0"),
    ],
    ids=["one space", "one group"],
)
def test_address_spaces_of_a_device_that_has_one(parent, words):
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened(parent) as (_, device):
        device.accept_features(1 << 32)
        with pytest.raises(ValueError, match=words):
            queue.attach(device, 0, address_space=1)


def test_a_driver_that_was_not_told_to_heed_address_spaces_has_one():
    """Without IOTLB_ASID the kernel takes every address space in an IOTLB message for 0."""
    parent = Parent(address_spaces=2, groups=((0, 0), (1, 1)))
    with GuestMemory(1 << 20) as memory, opened(parent, backend_features=1 << 1 | 1 << 2) as (kernel, device):
        assert device.address_space_count == 1
        with pytest.raises(ValueError, match="no address space 1"):
            device.map([replace(memory.region, address_space=1)])
        assert kernel.iotlb == {}


def test_a_parent_that_forgets_its_mappings_is_shown_them_again():
    """Without IOTLB_PERSIST vhost keeps its entries through a reset and the device does not: INVALIDATE, then UPDATE."""
    with GuestMemory(1 << 20) as memory, opened(PARENTS["VDUSE"]) as (kernel, device):
        device.map([memory.region])
        kernel.log.clear()
        device.reset()
        messages = [name for kind, name in (entry for entry in kernel.log if entry[0] == "IOTLB")]
        assert messages == ["INVALIDATE", "UPDATE"]
        assert kernel.iotlb[0] == {memory.guest_address: memory.size_bytes}


def test_with_iotlb_persist_a_reset_leaves_mappings_alone():
    with GuestMemory(1 << 20) as memory, opened(Parent()) as (kernel, device):
        device.map([memory.region])
        kernel.log.clear()
        device.reset()
        assert not [entry for entry in kernel.log if entry[0] == "IOTLB"]


def test_close_takes_the_mappings_away_first():
    """VDUSE's daemon hears nothing of a close: it would keep the memory."""
    kernel = FakeKernel(PARENTS["VDUSE"])
    with GuestMemory(1 << 20) as memory, VhostVdpa.open(NODE, system=kernel) as device:
        device.map([memory.region])
        kernel.log.clear()
        device.close()
    assert kernel.log == ["VHOST_VDPA_SET_STATUS", ("IOTLB", "INVALIDATE")]


def test_backend_bits_that_nobody_knows_are_not_acknowledged():
    """A parent may report more than SET takes: bit 9 here."""
    with opened(Parent(extra_backend_features=1 << 9 | 1 << 40)) as (kernel, device):
        assert kernel.acknowledged == device.backend_features == 0x17E


def test_descriptor_groups_are_not_acknowledged_without_address_spaces():
    with opened(PARENTS["mlx5, firmware with freeze_to_rdy"], backend_features=~(1 << 3)) as (kernel, _):
        assert not kernel.acknowledged >> 7 & 1


def test_descriptor_groups():
    with opened(PARENTS["mlx5, firmware with freeze_to_rdy"]) as (_, device):
        assert (device.queue_group(1), device.queue_descriptor_group(1)) == (0, 2)
        assert (device.queue_group(2), device.queue_descriptor_group(2)) == (1, 1)
    with opened(Parent()) as (_, device), pytest.raises(KernelError, match="descriptors share the queue's group"):
        device.queue_descriptor_group(0)


def test_queue_sizes():
    with opened(PARENTS["vp_vdpa"]) as (_, device):
        assert device.queue_size_max(1) == 256
    with opened(Parent()) as (_, device), pytest.raises(KernelError, match="one maximum for all queues"):
        device.queue_size_max(1)


@pytest.mark.parametrize("base", [PackedBase(), PackedBase(5, False, 3, True), PackedBase(0x7FFF, True, 0x7FFF, False)])
def test_packed_bases(base):
    parent = Parent(features=1 << 32 | 1 << 33 | 1 << 34)
    with opened(parent) as (kernel, device):
        device.accept_features(1 << 32 | 1 << 34)
        device.set_base(1, base)
        assert kernel.bases[1] == base.encode()
        assert device.get_base(1) == base


def test_locked_memory_is_named_as_the_cause():
    parent = Parent(memlock_bytes=1 << 16)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, hard))
    try:
        with GuestMemory(1 << 20) as memory, opened(parent) as (_, device):
            with pytest.raises(KernelError, match=f"if pages are pinned: {1 << 20} bytes needed, limit {1 << 16}"):
                device.map([memory.region])
            assert device.regions == []
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
