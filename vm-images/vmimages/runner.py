"""Boot the test machine, run one command in it, stream its output, and tell how it ended."""

from __future__ import annotations

import fcntl
import math
import os
import re
import secrets
import select
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Self

from .host import RUN, need
from .kernel import Kernel
from .outcome import Outcome, Result, judge
from .payload import write_payload
from .qemu import TESTED_DISK_BYTES, Machine, accelerator
from .rootfs import rootfs

__all__ = ["Outcome", "OutputLost", "Result", "run"]

_PREFIX = "vdpabridge-vm-"
_END_BYTES = 4096
_EXIT = re.compile(rb"^exit \d+$", re.MULTILINE)


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    repository: Path,
    time_limit_s: float = 600,
    memory_mib: int = 1024,
    kernel_arguments: str = "",
    environment: Mapping[str, str] | None = None,
    extra: Sequence[Path] = (),
    output: BinaryIO | None = None,
) -> Result:
    """Run ``command`` as root in a fresh machine, with ``repository`` as its working directory, ``extra`` in
    /run/payload/with.

    Output (standard output and error together) is copied to ``output``, by default this process's standard output,
    as it comes. The guest is thrown away afterwards. Interrupting the call ends the machine too.

    Raises `HostError` if QEMU or an image is missing and cannot be made, `OutputLost` if ``output`` accepts no more.
    """
    need(RUN)
    root = rootfs()
    with ExitStack() as stack:
        scratch = stack.enter_context(_scratch())
        mark = secrets.token_hex(16)
        write_payload(scratch / "payload.tar", repository, command, environment or {}, extra, mark=mark)
        with (scratch / "tested-disk").open("wb") as disk:
            disk.truncate(TESTED_DISK_BYTES)
        machine = Machine(
            kernel=kernel.image,
            root=root,
            payload=scratch / "payload.tar",
            tested_disk=scratch / "tested-disk",
            console=scratch / "console",
            output_socket=scratch / "output",
            status_socket=scratch / "status",
            memory_mib=memory_mib,
            kernel_arguments=kernel_arguments,
        )
        ports = stack.enter_context(_Ports(machine, output or sys.stdout.buffer, b"\0" + mark.encode() + b"\n"))
        qemu = stack.enter_context(
            subprocess.Popen(
                # the machine dies with this process, however that ends
                ["setpriv", "--pdeathsig", "KILL", "--", *machine.command(accelerator(kernel.image))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process, which then ends the machine
            )
        )
        stack.callback(qemu.kill)
        begin_s = time.monotonic()
        ports.end_s = begin_s + time_limit_s
        _attend(qemu, ports, ports.end_s)
        elapsed_s = time.monotonic() - begin_s
        said = (
            qemu.stdout.read().decode(errors="replace").strip() if qemu.returncode is not None and qemu.stdout else ""
        )
        log = machine.console.read_text(errors="replace") if machine.console.exists() else ""
        result = judge(ports.status.decode(), log, qemu.returncode, said, elapsed_s)
        if not ports.complete:
            ports.hand_on_rest()
            if result.outcome is Outcome.FINISHED:
                raise OutputLost(f"the machine ended before all of its output was here, after {elapsed_s:.0f} s")
        return replace(result, output_end=ports.output_end)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for this run. Removes the folders of runs that were killed: nobody has them locked."""
    parent = Path(_short_folder() or tempfile.gettempdir())
    for left in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), (left / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        scratch = Path(name)
        with (scratch / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield scratch


def _short_folder() -> str | None:
    """Where temporary files go: a socket's path may have 107 characters, and QEMU splits options at commas."""
    usual = tempfile.gettempdir()
    return "/tmp" if len(usual) > 60 or "," in usual else None


def _attend(qemu: subprocess.Popen[bytes], ports: _Ports, end_s: float) -> None:
    """Copy output until the machine ends or time is up."""
    while (left_s := end_s - time.monotonic()) > 0:
        ended = qemu.poll() is not None
        while ports.copy(0.0 if ended else min(left_s, 0.25)) and time.monotonic() < end_s:
            left_s = 0.0
        if ended:
            return


class OutputLost(RuntimeError):
    """The guest's output cannot be handed on."""


class _Ports:
    """The two sockets that QEMU connects the guest's ports to: output is copied to ``sink``, status is kept."""

    def __init__(self, machine: Machine, sink: BinaryIO, mark: bytes) -> None:
        self.status = b""
        self.end_s = math.inf
        """When to stop waiting for a reader of the output too."""
        self.output_end = b""
        self._held = b""
        """Output that may be the beginning of the mark."""
        self._mark = mark
        self.complete = False
        """Whether all of the output is here."""
        self._sink = sink
        self._guest: socket.socket | None = None
        """To tell the guest that all of its output is here."""
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []
        for path, port in ((machine.output_socket, "output"), (machine.status_socket, "status")):
            listener = socket.socket(socket.AF_UNIX)
            self._sockets.append(listener)
            listener.bind(str(path))
            listener.listen(1)
            self._selector.register(listener, selectors.EVENT_READ, (listener, port))

    def copy(self, timeout_s: float) -> bool:
        """Take in what there is, once; wait ``timeout_s`` if there is nothing. Returns whether something came."""
        events = self._selector.select(timeout_s)
        for key, _ in events:
            listener, port = key.data
            if listener is not None:
                connection, _address = listener.accept()
                self._sockets.append(connection)
                self._selector.register(connection, selectors.EVENT_READ, (None, port))
                if port == "status":
                    self._guest = connection
            elif not (chunk := os.read(key.fd, 65536)):
                self._selector.unregister(key.fileobj)
            elif port == "output":
                self._take_output(chunk)
            else:
                self.status += chunk
        if self.complete and self._guest is not None and _EXIT.search(self.status):
            # the guest waits for this, or is gone already
            with suppress(OSError):
                self._guest.send(b"\n")
            self._guest = None
        return bool(events)

    def _take_output(self, chunk: bytes) -> None:
        """Hand on what comes before the mark, which ends it."""
        if self.complete:
            return
        data, mark, _ = (self._held + chunk).partition(self._mark)
        self.complete = bool(mark)
        begins = (size for size in range(len(self._mark) - 1, -1, -1) if data.endswith(self._mark[:size]))
        kept = 0 if mark else next(begins)
        self._held = data[len(data) - kept :]
        data = data[: len(data) - kept]
        self.output_end = (self.output_end + data)[-_END_BYTES:]
        self._hand_on(data)

    def hand_on_rest(self) -> None:
        """Hand on what was held back, if the mark did not come."""
        self._hand_on(self._held)
        self._held = b""

    def _hand_on(self, chunk: bytes) -> None:
        try:
            fd = self._sink.fileno()
        except OSError:
            # in memory: it takes everything
            self._sink.write(chunk)
            return
        room = select.poll()
        room.register(fd, select.POLLOUT)
        while chunk:
            left_s = min(self.end_s - time.monotonic(), 3600.0)
            if left_s <= 0 or not room.poll(left_s * 1000):
                return
            try:
                # a pipe with room takes so much at once
                chunk = chunk[os.write(fd, chunk[: select.PIPE_BUF]) :]
            except OSError as error:
                raise OutputLost(f"the output cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for each in self._sockets:
            each.close()
