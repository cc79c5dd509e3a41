"""The vhost-vdpa driver against a fake kernel: handshake, refusals, signals, deadlines, order of requests."""

import contextlib
import os
import signal
import threading
import time
from contextlib import contextmanager
from errno import EBUSY, EINVAL, EMFILE, ENOENT, ENOTTY, EPERM, ETIMEDOUT

import pytest

from vdpabridge.abi.vhost import VhostIoctl as Ioctl
from vdpabridge.device import MemoryRegion, QueueSetup, RunState, SplitBase
from vdpabridge.drivers.vhost_vdpa import NodeError, VhostVdpa
from vdpabridge.drivers.vhost_vdpa.explain import explain
from vdpabridge.errors import (
    ENOTSUPP,
    DeadlineExceeded,
    DeviceFailed,
    FeatureError,
    KernelError,
    StateError,
    VdpaBridgeError,
)
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

from ..support.fake_kernel import ACK, DRIVER, FAILED, FEATURES_OK, NEEDS_RESET, FakeKernel, Parent
from ..support.waiting import signalled, wait_until

NODE = "/dev/vhost-vdpa-0"


@contextmanager
def opened(parent=None, **options):
    kernel = FakeKernel(parent, **options)
    with VhostVdpa.open(NODE, system=kernel) as device:
        yield kernel, device


def test_identity():
    with opened() as (_, device):
        identity = device.identity
        assert (identity.device_id, identity.queue_count, identity.queue_size_max, identity.config_size_bytes) == (
            2,
            2,
            256,
            64,
        )
        assert device.offered_features == 1 << 32
        assert repr(device) == "<VhostVdpa /dev/vhost-vdpa-0: reset>"


def test_handshake_order():
    with opened() as (kernel, device):
        kernel.log.clear()
        device.accept_features(1 << 32)
        sets = [name for name in kernel.log if "SET" in name]
        assert sets == ["VHOST_VDPA_SET_STATUS"] * 2 + ["VHOST_SET_FEATURES", "VHOST_VDPA_SET_STATUS"]
        assert kernel.driver_features == 1 << 32 | 1 << 33, "ACCESS_PLATFORM is the transport's to add"
        assert kernel.status == 0xB


def test_a_device_that_does_not_show_features_ok():
    """SET_STATUS answers 0 all the same."""
    with opened(Parent(refuses_features_ok=True)) as (kernel, device):
        with pytest.raises(FeatureError, match="did not set FEATURES_OK"):
            device.accept_features(1 << 32)
        assert device.state is RunState.RESET
        assert kernel.status == 0


@pytest.mark.parametrize("bits", [NEEDS_RESET, FAILED, 0], ids=["NEEDS_RESET", "FAILED", "no DRIVER_OK"])
def test_a_device_that_fails_to_start(bits):
    parent = Parent(fails_at_driver_ok=bits or 8)
    with opened(parent) as (_, device):
        device.accept_features(1 << 32)
        with pytest.raises(DeviceFailed, match=r"status is .* after writing"):
            device.start()
        assert device.state is RunState.FAILED
        device.reset()
        assert device.state is RunState.RESET


def test_a_device_that_fails_while_running():
    with opened() as (kernel, device):
        device.accept_features(1 << 32)
        device.start()
        kernel.status |= NEEDS_RESET
        with pytest.raises(DeviceFailed, match="NEEDS_RESET"):
            device.suspend()
        assert "VHOST_VDPA_SUSPEND" not in kernel.log


def test_suspend_is_not_asked_of_a_device_that_is_not_live():
    """The request would answer 0 and do nothing."""
    with opened() as (kernel, device):
        device.accept_features(1 << 32)
        device.start()
        kernel.status = 0xB
        with pytest.raises(DeviceFailed, match="but the device was started"):
            device.suspend()


def test_resume_is_not_asked_of_a_device_that_failed_while_suspended():
    """RESUME, too, answers 0 and does nothing without DRIVER_OK."""
    with opened() as (kernel, device):
        device.accept_features(1 << 32)
        device.start()
        device.suspend()
        kernel.status = 0x43
        with pytest.raises(DeviceFailed, match="NEEDS_RESET"):
            device.resume()
        assert "VHOST_VDPA_RESUME" not in kernel.log


@pytest.mark.parametrize("status", [0x4B, 0x8F, 0x0B])
def test_health_is_asked_of_the_device(status):
    with opened() as (kernel, device):
        device.check_health()
        device.accept_features(1 << 32)
        device.start()
        device.check_health()
        kernel.status = status
        with pytest.raises(DeviceFailed, match="status is"):
            device.check_health()
        with pytest.raises(DeviceFailed, match="status is"):
            device.check_health()


def test_the_kernels_own_timeout_is_no_deadline():
    """ETIMEDOUT from a parent's mailbox says nothing about our clock, and nothing is stuck."""
    with opened() as (kernel, device):
        device.timeout_s = 60
        kernel.vhost_get_features = lambda _: ETIMEDOUT
        with pytest.raises(KernelError, match="ETIMEDOUT") as caught:
            device.accept_features(1 << 32)
        assert caught.value.errno == ETIMEDOUT
        device.reset()


def test_a_refusal_in_the_handshake_leaves_memory_mapped():
    """Without IOTLB_PERSIST the way back to status 0 makes the device forget: it is shown its memory again."""
    parent = Parent(persist=False, refuses_features_ok=True)
    with GuestMemory(1 << 20) as memory, opened(parent) as (kernel, device):
        device.map([memory.region])
        kernel.log.clear()
        with pytest.raises(FeatureError):
            device.accept_features(1 << 32)
        assert ("IOTLB", "UPDATE") in kernel.log
        assert kernel.iotlb[0] == {memory.guest_address: memory.size_bytes}


def test_a_closed_device_says_so():
    with opened() as (_, device):
        device.close()
        assert repr(device) == "<VhostVdpa /dev/vhost-vdpa-0: closed>"
        with pytest.raises(VdpaBridgeError, match="the device was closed"):
            device.accept_features(1 << 32)


def test_an_eventfd_that_is_refused_leaves_nothing():
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened() as (kernel, device):
        device.accept_features(1 << 32)
        kernel.vhost_set_vring_kick = lambda _: EINVAL
        with pytest.raises(KernelError):
            device.set_kick(0, queue.kick_fd)
        assert device.queues == {}


def test_the_kernel_is_told_of_an_eventfd_only_when_it_can_be_remembered(monkeypatch):
    """Out of descriptors: the kernel must not listen to what a reset would not take away."""
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened() as (kernel, device):
        device.accept_features(1 << 32)

        def no_more(_):
            raise OSError(EMFILE, "Too many open files")

        monkeypatch.setattr("vdpabridge.device.records.os.dup", no_more)
        with pytest.raises(OSError, match="Too many"):
            device.set_kick(0, queue.kick_fd)
        monkeypatch.undo()
        assert ("kick", 0) not in kernel.eventfds


def test_regions_named_twice_are_refused_before_anything_happens():
    with GuestMemory(1 << 20) as memory, opened() as (kernel, device):
        device.map([memory.region])
        with pytest.raises(ValueError, match="named twice"):
            device.unmap([memory.region, memory.region])
        assert kernel.iotlb[0]


def test_one_region_is_no_batch_so_that_its_failure_is_heard():
    with GuestMemory(1 << 20) as memory, opened() as (kernel, device):
        kernel.log.clear()
        device.map([memory.region])
        assert kernel.log == [("IOTLB", "UPDATE")]
        halves = [MemoryRegion(0x9000_0000 + n * 4096, 4096, memory.fileno()) for n in range(2)]
        kernel.log.clear()
        device.map(halves)
        assert [name for _, name in kernel.log] == ["BATCH_BEGIN", "UPDATE", "UPDATE", "BATCH_END"]


def test_queues_are_enabled_at_start_when_all_is_known():
    """A queue takes its addresses and base when it is enabled: a later change would go unseen."""
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened() as (kernel, device):
        device.accept_features(1 << 32)
        device.enable_queue(0)
        device.enable_queue(1)
        device.set_queue(0, queue.setup)
        device.set_base(0, SplitBase(9))
        assert kernel.enabled == {0: False, 1: False}
        kernel.log.clear()
        device.start()
        assert kernel.enabled == {0: True, 1: False}, "a queue without addresses is left alone"
        assert kernel.log.index("VHOST_VDPA_SET_VRING_ENABLE") < kernel.log.index("VHOST_VDPA_SET_STATUS")


def test_a_device_is_stopped_before_its_memory_goes():
    with GuestMemory(1 << 20) as memory, opened() as (kernel, device):
        device.map([memory.region])
        device.accept_features(1 << 32)
        device.start()
        kernel.log.clear()
        device.close()
        assert kernel.log == ["VHOST_VDPA_SET_STATUS", ("IOTLB", "INVALIDATE")]


def test_a_large_configuration_space_is_read_in_pieces():
    """An ioctl with a buffer over 1024 bytes would hold the interpreter."""
    config = bytes(range(256)) * 16
    with opened(Parent(config=config)) as (kernel, device):
        kernel.log.clear()
        assert device.read_config() == config
        assert kernel.log.count("VHOST_VDPA_GET_CONFIG") == 5
        device.accept_features(1 << 32)
        device.write_config(0, config)


def test_status_is_never_written_while_suspended():
    with opened() as (kernel, device):
        device.accept_features(1 << 32)
        device.start()
        device.suspend()
        kernel.log.clear()
        device.resume()
        assert "VHOST_VDPA_SET_STATUS" not in kernel.log


@pytest.mark.parametrize("step", ["start", "resume", "enable"])
def test_queues_are_kicked_by_the_driver(step):
    """A kick from before ENABLE, before DRIVER_OK or while suspended may be lost."""
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened() as (_, device):
        device.accept_features(1 << 32)
        queue.attach(device, 0)
        if step == "enable":
            device.enable_queue(0, False)
        device.start()
        if step != "start":
            with pytest.raises(BlockingIOError) if step == "enable" else _nothing():
                os.eventfd_read(queue.kick_fd)
        if step == "resume":
            device.suspend()
            device.resume()
        if step == "enable":
            device.enable_queue(0)
        assert os.eventfd_read(queue.kick_fd) == 1


@contextmanager
def _nothing():
    yield


def test_signals_are_retried():
    kernel = FakeKernel(interruptions=5)
    with GuestMemory(1 << 20) as memory, VhostVdpa.open(NODE, system=kernel) as device:
        kernel.interruptions = 3
        device.map([memory.region])
        kernel.interruptions = 2
        device.accept_features(1 << 32)
        assert kernel.interruptions == 0


def test_a_request_that_hangs_meets_its_deadline():
    """The kernel cannot be stopped: the device says what it is stuck in, and queues nothing behind it."""
    with opened(hang_on="VHOST_VDPA_SUSPEND") as (kernel, device):
        device.accept_features(1 << 32)
        device.start()
        device.timeout_s = 0.05
        with pytest.raises(DeadlineExceeded, match=r"VHOST_VDPA_SUSPEND: no answer within 0.05 s"):
            device.suspend()
        with pytest.raises(DeadlineExceeded, match="VHOST_VDPA_SUSPEND is still in the kernel"):
            device.reset()
        kernel.release.set()


@contextmanager
def set_up(hang_on):
    """(kernel, device): two queues, and a request that will hang."""
    with GuestMemory(1 << 20) as memory, opened() as (kernel, device):
        device.map([memory.region])
        device.accept_features(1 << 32)
        for index in range(2):
            device.set_queue(index, QueueSetup(16, *(memory.allocate(4096) for _ in range(3))))
            device.enable_queue(index)
        kernel.hang_on = hang_on
        try:
            yield kernel, device
        finally:
            kernel.release.set()


def let_go(kernel):
    """The kernel comes back, whatever that brings about; the requests that it brings about."""
    before = list(kernel.log)
    kernel.release.set()
    wait_until(lambda: "vdpabridge-call" not in [thread.name for thread in threading.enumerate()])
    return kernel.log[len(before) :]


@pytest.mark.parametrize("hang_on", ["VHOST_VDPA_SET_VRING_ENABLE", "VHOST_VDPA_SET_STATUS", "VHOST_VDPA_GET_STATUS"])
def test_nothing_more_is_asked_for_who_does_not_wait_any_more(hang_on):
    """Else a device would start after its start was reported as failed, and another one was told to go on."""
    with set_up(hang_on) as (kernel, device):
        device.timeout_s = 0.05
        with pytest.raises(DeadlineExceeded, match=f"{hang_on}: no answer within"):
            device.start()
        kernel.status = NEEDS_RESET
        assert let_go(kernel) == []
        assert device.state is RunState.RUNNING, (
            "for all that is known; nor is it judged by an answer that came too late"
        )
        kernel.hang_on = None
        device.timeout_s = 5
        device.reset()


def test_a_device_that_is_given_up_while_the_kernel_has_it_may_still_do_something():
    with set_up("VHOST_VDPA_SET_STATUS") as (kernel, device):
        device.timeout_s = 0.05
        with pytest.raises(DeadlineExceeded):
            device.start()
        assert not device.give_up()
        let_go(kernel)
    with set_up(None) as (kernel, device):
        device.timeout_s = 5
        device.start()
        assert device.give_up()


def test_a_close_is_made_be_it_late():
    with opened() as (kernel, device):
        device.timeout_s = 0
        with contextlib.suppress(DeadlineExceeded):
            device.close()
        wait_until(lambda: kernel.fd == -1)


def test_nobody_is_kicked_for_who_does_not_wait_any_more():
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    with set_up("VHOST_VDPA_RESUME") as (kernel, device):
        device.set_kick(0, kick)
        device.start()
        device.suspend()
        os.eventfd_read(kick)
        device.timeout_s = 0.05
        with pytest.raises(DeadlineExceeded, match="VHOST_VDPA_RESUME: no answer within"):
            device.resume()
        let_go(kernel)
        assert not signalled(kick)
    os.close(kick)


def test_a_request_that_there_is_no_time_for_is_not_made():
    with set_up(None) as (kernel, device):
        device.timeout_s = 0
        kernel.log.clear()
        for _ in range(50):
            with pytest.raises(DeadlineExceeded):
                device.set_base(0, SplitBase(7))
        # the thread may be quick enough for some, whose answer nobody waited for: then no other is made
        assert len(kernel.log) <= 1
        device.timeout_s = None


@contextmanager
def alarms(error, *times_s):
    """An alarm at the first time, and then again and again, raises ``error``."""

    def handler(*_):
        raise error

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *times_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_comes_when_the_kernel_has_answered(error):
    """Else nobody knows what has become of the request, and the device could not be used any more."""
    with set_up("VHOST_VDPA_SET_VRING_ENABLE") as (kernel, device):
        device.timeout_s = 10
        timer = threading.Timer(0.3, kernel.release.set)
        timer.start()
        with alarms(error, 0.05), pytest.raises(error):
            device.start()
        timer.join()
        assert "VHOST_VDPA_GET_STATUS" in kernel.log[-2:], "all of it was done"
        device.reset()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_second_interruption_ends_the_wait(error):
    with set_up("VHOST_VDPA_SET_VRING_ENABLE") as (kernel, device):
        device.timeout_s = 10

        def interrupt_twice():
            wait_until(lambda: kernel.hang_on in kernel.log)
            for _ in range(2):
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGALRM)

        thread = threading.Thread(target=interrupt_twice)
        thread.start()
        with alarms(error, 0), pytest.raises(error):
            device.start()
        thread.join()
        with pytest.raises(DeadlineExceeded, match="VHOST_VDPA_SET_VRING_ENABLE is still in the kernel"):
            device.reset()
        assert let_go(kernel) == []


def test_a_resume_that_ends_too_late_is_taken_for_one_that_has():
    """Else positions would be asked of a device that runs."""
    with set_up("VHOST_VDPA_RESUME") as (kernel, device):
        device.start()
        device.suspend()
        device.timeout_s = 0.05
        with pytest.raises(DeadlineExceeded):
            device.resume()
        let_go(kernel)
        kernel.hang_on = None
        device.timeout_s = 5
        with pytest.raises(StateError):
            device.get_base(0)
        device.suspend()
        assert kernel.log[-1] == "VHOST_VDPA_SUSPEND"
        device.get_base(0)


def test_a_fork_has_no_use_for_its_parents_thread():
    with set_up(None) as (_, device):
        device.timeout_s = 10
        assert device.status == ACK | DRIVER | FEATURES_OK
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(writer, str(device.status).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, encoding="ascii") as said:
            assert said.read() == "11"
        os.waitpid(pid, 0)


def test_an_open_that_hangs_meets_its_deadline_and_leaks_nothing():
    """Opening resets the device, which for VDUSE is a question to a daemon. The late descriptor is closed."""
    kernel = FakeKernel()
    opening = kernel.open
    opened_late, closed = threading.Event(), threading.Event()

    def slow_open(path):
        opened_late.wait(10)
        return opening(path)

    closing = kernel.close
    kernel.open, kernel.close = slow_open, lambda fd: (closing(fd), closed.set())
    with pytest.raises(DeadlineExceeded, match=r"open: no answer within 0\.05 s"):
        VhostVdpa.open(NODE, system=kernel, timeout_s=0.05)
    opened_late.set()
    assert closed.wait(5)
    assert kernel.fd == -1


def test_mappings_have_deadlines_too():
    with GuestMemory(1 << 20) as memory, opened() as (kernel, device):
        writing = kernel.write
        release = threading.Event()
        kernel.write = lambda fd, data: release.wait(10) and writing(fd, data)
        device.timeout_s = 0.05
        with pytest.raises(DeadlineExceeded, match=r"IOTLB message: no answer within 0\.05 s"):
            device.map([memory.region])
        release.set()


def test_a_deadline_carries_results_and_errors_through():
    with opened() as (_, device):
        device.timeout_s = 5.0
        device.accept_features(1 << 32)
        with pytest.raises(KernelError) as caught:
            device._node.call(Ioctl.VHOST_SET_FEATURES, bytearray(8))
        assert caught.value.errno == EBUSY


def test_a_reset_that_takes_its_time():
    with opened(Parent(slow_reset_reads=4)) as (_, device):
        device.accept_features(1 << 32)
        device.reset()
        assert device.status == 0


def test_a_reset_that_never_ends():
    with opened(Parent(slow_reset_reads=1 << 30)) as (_, device):
        device.timeout_s = 0.05
        with pytest.raises(DeadlineExceeded, match=r"status is still ACKNOWLEDGE\|DRIVER"):
            device.reset()


def test_a_reset_unbinds_every_eventfd():
    """vhost keeps listening to kick eventfds through a reset."""
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened() as (kernel, device):
        device.accept_features(1 << 32)
        queue.attach(device, 0)
        device.set_err(0, queue.call_fd)
        device.set_config_call(queue.call_fd)
        device.reset()
        assert set(kernel.eventfds.values()) == {-1}
        assert device.queues == {}


def test_eventfds_are_replaced_and_taken_away():
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, opened() as (kernel, device):
        device.accept_features(1 << 32)
        device.set_kick(0, queue.kick_fd)
        device.set_kick(0, queue.call_fd)
        assert kernel.eventfds["kick", 0] == queue.call_fd
        device.set_kick(0, None)
        assert kernel.eventfds["kick", 0] == -1
        device.set_config_call(queue.call_fd)
        device.set_config_call(None)


def test_configuration_space():
    with opened() as (_, device):
        assert device.read_config() == bytes(range(64))
        assert device.read_config(60) == bytes(range(60, 64))
        device.accept_features(1 << 32)
        device.write_config(0, b"abc")


def test_open_busy_and_missing():
    kernel = FakeKernel()
    with VhostVdpa.open(NODE, system=kernel), pytest.raises(NodeError) as caught:
        VhostVdpa.open(NODE, system=kernel)
    assert caught.value.errno == EBUSY
    with pytest.raises(NodeError, match="no such node") as caught:
        VhostVdpa.open("/dev/vhost-vdpa-7", system=kernel)
    assert caught.value.errno == ENOENT


def test_a_failed_open_closes_the_node():
    kernel = FakeKernel()
    kernel.vhost_get_backend_features = lambda _: EPERM
    with pytest.raises(KernelError, match="not the device's owner"):
        VhostVdpa.open(NODE, system=kernel)
    assert kernel.fd == -1


def test_nodes_are_looked_at_before_they_are_opened():
    with pytest.raises(NodeError, match="not a vhost-vdpa node") as caught:
        VhostVdpa.open("/dev/null")
    assert caught.value.errno == ENOTTY
    with pytest.raises(NodeError, match="no such node"):
        VhostVdpa.open("/dev/vhost-vdpa-does-not-exist")


def test_entry_limit_is_named():
    with GuestMemory(1 << 20) as memory, opened(Parent(entries_max=2048)) as (_, device):
        regions = [MemoryRegion(0x1000_0000 + 0x2000 * n, 4096, memory.fileno()) for n in range(2049)]
        with pytest.raises(KernelError, match=r"vhost_vdpa\.max_iotlb_entries is 2048"):
            device.map(regions)
        assert device.regions == []
        assert device.iotlb.entries == {}


def test_a_failed_step_leaves_the_run_state():
    with opened() as (_, device):
        device.accept_features(1 << 32)
        with pytest.raises(ValueError, match="does not fit 16 bits"):
            device.set_base(0, SplitBase(1 << 16))
        assert device.state is RunState.CONFIGURED
        assert device.queues == {}


def test_close_is_idempotent():
    with opened() as (kernel, device):
        device.close()
        device.close()
        assert kernel.fd == -1
        assert device.fileno() == -1


@pytest.mark.parametrize(
    ("request_name", "code", "words"),
    [
        ("open", EBUSY, "another process holds the device"),
        ("open", ENOTSUPP, "cache-coherent IOMMU"),
        (Ioctl.VHOST_SET_VRING_NUM, EINVAL, "power of two"),
        (Ioctl.VHOST_SET_VRING_NUM, EPERM, "owner"),
        (Ioctl.VHOST_VDPA_RESUME, ENOTTY, "does not know the request"),
    ],
)
def test_explanations(request_name, code, words):
    assert words in explain(request_name, code)[0]


def test_nothing_is_made_up():
    assert explain(Ioctl.VHOST_GET_FEATURES, 77) == ("", "")
    assert explain("open", 77) == ("", "")
