"""``vdpabridge demo``: a file server's state goes from one process into another, and the open file is read on.

Needs no root, no virtual machine, no network: both processes are ``vdpabridge serve sim:fs``, and this one is the
guest's driver and the front-end at once. ``make demo`` shows the same with vDPA devices on a kernel of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack

from ..abi.fuse import FUSE_ROOT_ID
from ..abi.virtio import VIRTIO_F_VERSION_1, VIRTIO_ID_FS
from ..device import Device, StateDirection, StatePhase
from ..drivers.vhost_user import VhostUser
from ..errors import VdpaBridgeError
from ..guest.fuse import FuseDriver
from ..guest.memory import GuestMemory
from ..guest.virtqueue import SplitQueue
from ..vhost_user.connection import Connection
from .timeline import Broken, Timeline, require

__all__ = ["demo"]

_TIMEOUT_S = 20.0
_MEMORY_BYTES = 1 << 20
_QUEUE_SIZE = 64
_LINE_BYTES = 36


def demo(arguments: argparse.Namespace) -> None:
    """``vdpabridge demo``. Raises `VdpaBridgeError` where it does not end well, and says so in its last line."""
    try:
        _demonstrate(Timeline(as_json=arguments.json))
    except (Broken, VdpaBridgeError) as error:
        print(json.dumps({"demo": "FAIL", "why": str(error)}) if arguments.json else f"demo: FAIL: {error}")
        raise VdpaBridgeError("demo", why=str(error)) from error
    print(json.dumps({"demo": "PASS"}) if arguments.json else "demo: PASS")


def _demonstrate(timeline: Timeline) -> None:
    """The whole story. Raises `Broken` or `VdpaBridgeError` where it does not end well."""
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(_MEMORY_BYTES))
        rings = [stack.enter_context(SplitQueue(memory, _QUEUE_SIZE)) for _ in range(2)]
        fuse = FuseDriver(memory, *rings, timeout_s=_TIMEOUT_S)
        with timeline.step("start two file servers, each a process of its own") as facts:
            source, source_process = _server(stack)
            destination, destination_process = _server(stack)
            facts += [f"process {process.pid}" for process in (source_process, destination_process)]
        with timeline.step("mount the first by FUSE requests on two virtqueues") as facts:
            _start(source, memory, rings)
            facts.append(f"FUSE 7.{fuse.init()}, {len(list(_names(fuse)))} names in its root")
        with timeline.step("open a file and read ten lines") as facts:
            nodeid = fuse.lookup(FUSE_ROOT_ID, "lines").nodeid
            handle = fuse.open(nodeid)
            expected = _read(fuse, nodeid, handle, 0, 20)
            facts.append(f"inode {nodeid}, handle {handle}, up to {_last_line(expected[: 10 * _LINE_BYTES])!r}")
        with timeline.step("suspend it: GET_VRING_BASE of every ring") as facts:
            source.suspend()
            bases = [source.get_base(index) for index in range(2)]
            facts.append(f"rings at {', '.join(str(base.avail_index) for base in bases)}")
        with timeline.step("save its state: SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE") as facts:
            state = _save(source)
            facts.append(f"{len(state)} bytes")
        with timeline.step("offer the second a copy without its last byte") as facts:
            facts.append(_refusal(destination, state[:-1]))
        with timeline.step("load the whole of it") as facts:
            _load(destination, state)
        with timeline.step("kill the first process"):
            source_process.send_signal(signal.SIGKILL)
            source_process.wait()
        with timeline.step("start the second on the same rings, where the first has stopped"):
            _start(destination, memory, rings, [base.avail_index for base in bases])
        with timeline.step("read on with the handle that the first has given out") as facts:
            read = _read(fuse, nodeid, handle, 10, 10)
            require(read == expected[10 * _LINE_BYTES :], f"read {read[:40]!r}, which is not what comes next")
            facts.append(f"up to {_last_line(read)!r}")


def _server(stack: ExitStack) -> tuple[Device, subprocess.Popen[bytes]]:
    """A process that serves a file system, and the device that it is to us."""
    ours, theirs = socket.socketpair()
    with theirs:
        arguments = [sys.executable, "-m", "vdpabridge", "serve", "sim:fs", "--fd", str(theirs.fileno())]
        process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL, env=_environment())
    stack.callback(_end, process)
    connection = Connection(ours, f"process {process.pid}", timeout_s=_TIMEOUT_S)
    return stack.enter_context(VhostUser(connection, device_id=VIRTIO_ID_FS, timeout_s=_TIMEOUT_S)), process


def _environment() -> dict[str, str]:
    """This process's, in which this very package is found again, wherever it was found."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()


def _start(device: Device, memory: GuestMemory, rings: list[SplitQueue], bases: list[int] | None = None) -> None:
    device.map([memory.region])
    device.accept_features(1 << VIRTIO_F_VERSION_1)
    for index, ring in enumerate(rings):
        ring.attach(device, index, bases[index] if bases else 0)
    device.start()


def _save(device: Device) -> bytes:
    reader, writer = os.pipe()
    with open(reader, "rb") as file:
        device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
        state = file.read()
    device.check_state()
    return state


def _load(device: Device, state: bytes) -> None:
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
        file.write(state)
    device.check_state()


def _refusal(device: Device, state: bytes) -> str:
    """That ``device`` refuses ``state``."""
    try:
        _load(device, state)
    except VdpaBridgeError as error:
        return f"refused by {error.what}"
    require(False, "state without its end was taken")
    return ""


def _read(fuse: FuseDriver, nodeid: int, handle: int, first_line: int, count: int) -> bytes:
    return fuse.read(nodeid, handle, first_line * _LINE_BYTES, count * _LINE_BYTES)


def _last_line(data: bytes) -> str:
    return data.decode().splitlines()[-1]


def _names(fuse: FuseDriver) -> list[str]:
    handle = fuse.opendir(FUSE_ROOT_ID)
    names = [name for name in fuse.readdir(FUSE_ROOT_ID, handle) if name not in (".", "..")]
    fuse.release(FUSE_ROOT_ID, handle, directory=True)
    return names
