"""Back-ends as processes, by the hundred: forked from one that has everything loaded, and each goes wrong on demand.

``python3 -m tests.support.nursery`` is that one; it forks a back-end for each path that it reads.
"""

import ctypes
import itertools
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager

from vdpabridge.device import Capability
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.sim.transfer import Transfer
from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.export.vhost_user import Server
from vdpabridge.export.vhost_user.server import listen
from vdpabridge.vhost_user.connection import Connection

from .disk_lab import DISK_BYTES

PR_SET_PDEATHSIG = 1
FAULTS = ("killed", "stopped", "mute")
#: Of each kind of event: how many there were (written by the back-end), at which to go wrong, and how (by the test).
KINDS = ("message", "piece")
EVENTS = struct.Struct("=QQQ")
SHARED_BYTES = EVENTS.size * len(KINDS)


class BackEnd:
    """A back-end's process, from the test's side."""

    def __init__(self, pid, path, shared):
        self.path = path
        self._pidfd = os.pidfd_open(pid)
        self._shared = shared

    def events(self, kind):
        """Messages that came and replies that were about to be sent; or pieces of state about to be read or written."""
        return EVENTS.unpack_from(self._shared, KINDS.index(kind) * EVENTS.size)[0]

    def arm(self, kind, number, fault):
        """Let it go wrong at the ``number``-th event of that kind from now on."""
        place = KINDS.index(kind) * EVENTS.size
        struct.pack_into("=QQ", self._shared, place + 8, self.events(kind) + number, FAULTS.index(fault))

    def open(self, timeout_s=10):
        return VhostUser.open(self.path, device_id=2, config_size_bytes=60, timeout_s=timeout_s)

    def go_on(self):
        """After it was stopped."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def kill(self):
        """End it, and wait until it has ended."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        assert select.select([self._pidfd], [], [], 10)[0]

    def close(self):
        self.kill()
        os.close(self._pidfd)
        self._shared.close()


@contextmanager
def nursery(folder):
    """A function that gives a new back-end, in a context of its own; also to several threads at once."""
    words = [sys.executable, "-m", "tests.support.nursery"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        numbers = itertools.count()
        lock = threading.Lock()

        @contextmanager
        def back_end(disk=""):
            """A disk whose content is its state; or one without state, whose content is in file ``disk``."""
            path = f"{folder}/{next(numbers)}"
            with open(f"{path}.shared", "w+b") as file:
                file.truncate(SHARED_BYTES)
                shared = mmap.mmap(file.fileno(), SHARED_BYTES)
            with lock:
                process.stdin.write(f"{path} {disk}\n")
                process.stdin.flush()
                made = BackEnd(int(process.stdout.readline()), path, shared)
            try:
                yield made
            finally:
                made.close()

        yield back_end


class Trap:
    """Counts, and does what it is told when its number has come."""

    def __init__(self, path):
        with open(f"{path}.shared", "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), SHARED_BYTES)

    def event(self, kind):
        place = KINDS.index(kind) * EVENTS.size
        count, at, fault = EVENTS.unpack_from(self._shared, place)
        struct.pack_into("=Q", self._shared, place, count + 1)
        if count + 1 == at:
            go_wrong(FAULTS[fault])


class Counting(Connection):
    trap = None

    def take_in(self):
        message = super().take_in()
        if message is not None:
            self.trap.event("message")
        return message

    def send(self, *words, **options):
        self.trap.event("message")
        super().send(*words, **options)


def count_pieces(trap):
    """Have the simulator's transfers count as well."""
    before = Transfer._wait

    def wait(self, events):
        trap.event("piece")
        before(self, events)

    Transfer._wait = wait


def go_wrong(fault):
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        # this thread says nothing any more; the one that has the ring works on
        threading.Event().wait()


class WithoutState(Sim):
    capabilities = frozenset(Capability) - {Capability.DEVICE_STATE}


def be_back_end(path, disk):
    Counting.trap = Trap(path)
    count_pieces(Counting.trap)
    with (
        WithoutState.blk_file(disk, timeout_s=60) if disk else Sim.blk(DISK_BYTES, timeout_s=60) as device,
        listen(path) as listener,
        Server(device, report=lambda text: None) as server,
    ):
        print(os.getpid(), flush=True)
        while True:
            server.serve_connection(Counting(listener.accept()[0], "the front-end"))


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        if os.fork() == 0:
            os.close(sys.stdin.fileno())
            # with whoever forks, who ends with the test
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            path, _, disk = line.rstrip("\n").partition(" ")
            be_back_end(path, disk)


if __name__ == "__main__":
    main()
