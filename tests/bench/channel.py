"""A gibibyte of state from a back-end's process into a file in memory, in all the ways there are."""

import hashlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

from vdpabridge.device import Capability, Device, Identity, RunState
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.procedures import save
from vdpabridge.state.transfer.channel import Limits, copy, enlarge

from .table import show

SIZE_BYTES = 1 << 30
SOURCE = Path(__file__).with_name("channel.c")


def measure(runs):
    """Each way ``runs`` times, in turns."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="vb-") as folder:
        program = f"{folder}/channel"
        subprocess.run(["gcc", "-O2", "-o", program, SOURCE], check=True)
        sink = f"{folder}/sink"
        ways = {
            "C, splice, 1 MiB pipe": lambda: piped(program, [program, "splice", sink]),
            "vdpabridge, no hash": lambda: ours(program, sink, copy_plain),
            "cat": lambda: piped(program, ["sh", "-c", f"cat >{sink}"]),
            "as QEMU: C, read and write": lambda: piped(program, [program, "copy", sink]),
            "vdpabridge, image": lambda: ours(program, sink, copy_image),
            "SHA-256 alone": hash_alone,
        }
        series = {name: [] for name in ways}
        for _ in range(runs):
            for name, way in ways.items():
                series[name].append(SIZE_BYTES / way() / 1e6)
    return show("Channel: 1 GiB into a file on tmpfs", "MB/s", series, against=next(iter(ways)))


def piped(program, words):
    """Seconds that ``words`` take to drink what the back-end pours."""
    writer = subprocess.Popen([program, "write", str(SIZE_BYTES)], stdout=subprocess.PIPE)
    begin_s = time.perf_counter()
    subprocess.run(words, stdin=writer.stdout, check=True)
    took_s = time.perf_counter() - begin_s
    writer.stdout.close()
    assert writer.wait() == 0
    return took_s


def ours(program, path, way):
    """Seconds that we take, in this process."""
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    reader, writing = os.pipe()
    process = subprocess.Popen([program, "write", str(SIZE_BYTES)], stdout=writing)
    os.close(writing)
    begin_s = time.perf_counter()
    way(reader, sink)
    took_s = time.perf_counter() - begin_s
    os.close(sink)
    assert process.wait() == 0
    return took_s


def copy_plain(reader, sink):
    enlarge(reader)
    assert copy(reader, sink, Limits(Deadline(60))).size_bytes == SIZE_BYTES
    os.close(reader)


def copy_image(reader, sink):
    with Poured(reader) as device:
        assert save(device, sink, Limits(Deadline(60))).state_bytes == SIZE_BYTES


def hash_alone():
    data = bytes(1 << 20)
    begin_s = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(SIZE_BYTES >> 20):
        digest.update(data)
    return time.perf_counter() - begin_s


class Poured(Device):
    """A device whose state is what comes out of a descriptor; nothing else of it is asked for."""

    identity = Identity(None, 0, 1, 0)
    capabilities = frozenset({Capability.DEVICE_STATE, Capability.SUSPEND})
    offered_features = 0

    def __init__(self, reader):
        super().__init__("poured")
        self._reader = reader
        self._state = RunState.CONFIGURED

    def _set_state_fd(self, direction, phase, fd):
        os.close(fd)
        return self._reader

    def _check_state(self):
        return

    def _abandon_state(self):
        return

    def fileno(self):
        return self._reader

    def _reset(self):
        return

    _accept_features = _read_config = _map = _unmap = _set_queue = _set_base = _get_base = _reset
    _bind_eventfd = _enable_queue = _check_health = _start = _close = _reset
