"""A device belongs to the process that opened it: forks, execs and a second opener are told so."""

import os
import subprocess
import sys
import textwrap

import pytest

from vdpabridge.device import RunState
from vdpabridge.drivers.vhost_vdpa import NodeError, VhostVdpa
from vdpabridge.errors import OwnershipError


def in_a_fork(action):
    """What ``action`` returns in a forked child, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(action()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def refusal(action):
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_a_fork_cannot_touch_queues_or_memory(bench):
    bench.reach(RunState.SUSPENDED)
    for action in (
        lambda: bench.device.get_base(0),
        lambda: bench.device.set_kick(0, bench.queue.kick_fd),
        lambda: bench.device.unmap([bench.memory.region]),
        lambda: bench.device.reset(),
        lambda: bench.device.suspend(),
    ):
        text = in_a_fork(lambda action=action: refusal(action))
        assert text.startswith("OwnershipError: "), text
        assert f"process {os.getpid()}" in text
    # asking works, and the parent's device is as it was
    assert in_a_fork(lambda: bench.device.status) == "15"
    bench.device.get_base(0)


def test_a_fork_that_closes_its_copy_takes_nothing_away(running):
    bench, disk = running
    assert in_a_fork(lambda: refusal(bench.device.close)) == "None"
    disk.write(1)
    disk.settle(disk.driver.drain())
    assert disk.verify() == 1


def test_an_exec_loses_the_device(bench):
    """The descriptor is closed on exec; handed over on purpose, it is refused with the reason."""
    script = textwrap.dedent(
        """
        import sys
        from vdpabridge.drivers.vhost_vdpa import VhostVdpa
        from vdpabridge.drivers.vhost_vdpa.node import Node
        try:
            VhostVdpa(Node(int(sys.argv[1]), "handed over"))
        except Exception as error:
            print(error)
        """
    )
    fd = os.dup(bench.device.fileno())
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(fd)], pass_fds=[fd], capture_output=True, text=True, check=True
        )
    finally:
        os.close(fd)
    assert "VHOST_SET_OWNER: EBUSY: the device has an owner already" in done.stdout


def test_a_second_opener_is_told_who_has_it(bench):
    with pytest.raises(NodeError) as caught:
        VhostVdpa.open(bench.device.name)
    assert caught.value.errno == 16
    assert f"held by python3 (pid {os.getpid()})" in str(caught.value)


def test_ownership_error_is_raised_in_the_child_only(bench):
    assert "OwnershipError" in in_a_fork(lambda: refusal(lambda: bench.device.iotlb.invalidate(0, 1 << 40)))
    assert issubclass(OwnershipError, Exception)
    bench.device.unmap([bench.memory.region])
