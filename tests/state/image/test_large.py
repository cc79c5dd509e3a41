"""A gibibyte of state: through an image, a pipe and two processes, none of which has it in memory."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack

from vdpabridge.abi.vhost_user import FrontendRequest
from vdpabridge.abi.vhost_user_payloads import U64

from ...support.scripted import VIRTIOFSD, scripted

SIZE_BYTES = 1 << 30
#: Above what a process has that is connected and idle.
MORE_KIB = 64 << 10
PIECE = os.urandom(1 << 20)


class Far:
    """A back-end at the other end of a socket, which gives or takes the state."""

    def __init__(self, stack, work):
        self._work = work
        self._stack = stack
        self.digest = None
        self.back_end, self.ours = stack.enter_context(scripted(VIRTIOFSD, 1 << 32 | 1 << 30, timeout_s=None))
        self.back_end.answers[FrontendRequest.SET_DEVICE_STATE_FD] = self._begin

    def _begin(self, message):
        thread = threading.Thread(target=self._run, args=message.take_fds())
        thread.start()
        self._stack.callback(thread.join)
        return [(FrontendRequest.SET_DEVICE_STATE_FD, 5, U64(0x100).pack(), ())]

    def _run(self, fd):
        digest = hashlib.sha256()
        self._work(fd, digest)
        os.close(fd)
        self.digest = digest.hexdigest()


def pour(fd, digest):
    for _ in range(SIZE_BYTES // len(PIECE)):
        digest.update(PIECE)
        rest = memoryview(PIECE)
        while rest:
            rest = rest[os.write(fd, rest) :]


def swallow(fd, digest):
    while data := os.read(fd, 1 << 20):
        digest.update(data)


def program(what, far, **options):
    words = [sys.executable, "-m", "tests.support.streaming", what, str(far.ours.fileno())]
    return subprocess.Popen(words, pass_fds=[far.ours.fileno()], stderr=subprocess.PIPE, **options)


def test_a_gibibyte():
    with ExitStack() as stack:
        source, destination = Far(stack, pour), Far(stack, swallow)
        with (
            program("save", source, stdout=subprocess.PIPE) as saver,
            program("load", destination, stdin=saver.stdout) as loader,
        ):
            saver.stdout.close()
            said = [process.communicate(timeout=200)[1] for process in (saver, loader)]
        assert (saver.returncode, loader.returncode) == (0, 0), said
        for facts in map(json.loads, said):
            assert facts["state_bytes"] == SIZE_BYTES
            assert facts["after"] - facts["before"] < MORE_KIB
        assert destination.digest == source.digest is not None
