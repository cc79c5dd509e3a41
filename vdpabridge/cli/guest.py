"""``vdpabridge guest``: a guest in miniature, so that one can watch what happens to a guest.

It is a device's driver and its front-end at once. Every request's data is checked; once a second it says how many there
were, and how long the longest pause between two answers was: a suspend, a save or a migration is seen as one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from ..abi.fuse import FUSE_ROOT_ID
from ..abi.virtio import VIRTIO_F_VERSION_1, VIRTIO_ID_BLOCK, VIRTIO_ID_FS
from ..abi.virtio_blk import SECTOR_BYTES
from ..device import Device
from ..drivers.opening import open_device
from ..errors import UsageError, VdpaBridgeError
from ..guest.block import BLOCK_BYTES, BlockDriver, KnownDisk
from ..guest.fuse import FuseDriver
from ..guest.memory import GuestMemory
from ..guest.virtqueue import SplitQueue
from ..linux.deadline import NOW
from .readable import bytes_text, duration_text

__all__ = ["guest"]

_MEMORY_BYTES = 4 << 20
_QUEUE_SIZE = 128
#: A guest waits for its device for as long as it takes.
_FOR_EVER_S = 10.0**6
#: Bits from here on mean the same for every device.
_COMMON_FEATURES = 24
_FS_F_NOTIFICATION = 1
_BLOCKS_AT_ONCE = 16
_BLOCKS_MAX = 256
_CAPACITY_BYTES = 8
_FILES_MAX = 16
#: What the watch ends a wait of the main thread with.
_WAKE = signal.SIGUSR1
_KINDS = {"blk": VIRTIO_ID_BLOCK, "fs": VIRTIO_ID_FS}


def guest(arguments: argparse.Namespace) -> None:
    """Drive the device until Ctrl-C, or for ``--seconds``. Raises `VdpaBridgeError` for data that is wrong."""
    # as much of the configuration space as a disk's capacity takes: a file server has none, or more
    socket_name = f"vhost-user:{arguments.device},config-size={_CAPACITY_BYTES}"
    name = socket_name if _is_socket(arguments.device) else arguments.device
    with open_device(name, timeout_s=30.0) as device, ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(_MEMORY_BYTES))
        kind = arguments.kind or _kind_of(device)
        if arguments.write and kind != "blk":
            raise UsageError("guest", device=name, why="--write is for a disk")
        work = _Disk(device, memory, stack, write=arguments.write) if kind == "blk" else _Files(device, memory, stack)
        watch = _Watch(device, kind, arguments.seconds, as_json=arguments.json)
        try:
            with watch:
                while True:
                    for done_bytes in work.round():
                        watch.answered(done_bytes)
        except (KeyboardInterrupt, _Over):
            watch.end()


class _Over(BaseException):
    """There is nothing more to watch. As KeyboardInterrupt, it ends a wait, and nobody takes it for an error."""


class _Work(ABC):
    """What the guest does with its device."""

    @abstractmethod
    def round(self) -> Iterator[int]:
        """Some requests, each checked: the bytes of each as it is answered."""


class _Disk(_Work):
    """Reads blocks and compares them with what they were at first; with ``write``, writes what it then expects."""

    def __init__(self, device: Device, memory: GuestMemory, stack: ExitStack, *, write: bool) -> None:
        self._queue = _queues(device, memory, stack, 1)[0]
        self._driver = BlockDriver(memory, self._queue)
        self._known = KnownDisk(self._driver) if write else None
        knows_size = device.identity.config_size_bytes >= _CAPACITY_BYTES
        sectors = int.from_bytes(device.read_config(0, _CAPACITY_BYTES), "little") if knows_size else 0
        self._blocks = max(1, min(_BLOCKS_MAX, sectors * SECTOR_BYTES // BLOCK_BYTES))
        self._seen: dict[int, bytes] = {}
        self._next = 0

    def round(self) -> Iterator[int]:
        blocks = [(self._next + each) % self._blocks for each in range(min(_BLOCKS_AT_ONCE, self._blocks))]
        self._next = (self._next + len(blocks)) % self._blocks
        if self._known is not None:
            for block in blocks:
                self._known.write(block)
            self._queue.kick()
            self._known.settle(self._driver.drain(_FOR_EVER_S))
            for block in blocks:
                self._known.read(block)
            self._queue.kick()
            done = self._driver.drain(_FOR_EVER_S)
            self._known.settle(done)
            yield from (2 * BLOCK_BYTES for _ in done)
            return
        for block in blocks:
            self._driver.read(block * BLOCK_BYTES // SECTOR_BYTES, BLOCK_BYTES, tag=(block, 0))
        self._queue.kick()
        for request in self._driver.drain(_FOR_EVER_S):
            data = bytes(request.data)
            if self._seen.setdefault(request.tag[0], data) != data:
                why = f"block {request.tag[0]} is not what it was, and this guest has not written it"
                raise VdpaBridgeError("guest", why=why)
            yield len(data)


class _Files(_Work):
    """Keeps files of the root open, reads them again and again, and compares them with what they were at first."""

    def __init__(self, device: Device, memory: GuestMemory, stack: ExitStack) -> None:
        hiprio, requests = _queues(device, memory, stack, 2)
        self._fuse = FuseDriver(memory, hiprio, requests, timeout_s=_FOR_EVER_S)
        self._fuse.init()
        listing = self._fuse.opendir(FUSE_ROOT_ID)
        self._open: list[tuple[str, int, int, int]] = []
        self._seen: dict[tuple[str, int], bytes] = {}
        for name in self._fuse.readdir(FUSE_ROOT_ID, listing):
            if name not in (".", "..") and len(self._open) < _FILES_MAX:
                entry = self._fuse.lookup(FUSE_ROOT_ID, name)
                if stat.S_ISREG(entry.mode):
                    self._open.append((name, entry.nodeid, self._fuse.open(entry.nodeid), entry.size_bytes))
        self._fuse.release(FUSE_ROOT_ID, listing, directory=True)
        if not self._open:
            raise VdpaBridgeError("guest", device=device.name, why="there is no file in its root", hint="put one there")

    def round(self) -> Iterator[int]:
        for name, nodeid, handle, size_bytes in self._open:
            for offset in range(0, max(1, min(size_bytes, 16 * BLOCK_BYTES)), BLOCK_BYTES):
                data = self._fuse.read(nodeid, handle, offset, BLOCK_BYTES)
                if self._seen.setdefault((name, offset), data) != data:
                    raise VdpaBridgeError("guest", why=f"file {name!r} is not what it was at {offset}")
                yield len(data)


def _over(*_: object) -> None:
    raise _Over


class _Watch:
    """Says once a second what was done in it."""

    def __init__(self, device: Device, kind: str, seconds: float | None, *, as_json: bool) -> None:
        """``seconds``: after which it ends; None for no end."""
        self._device = device
        self._as_json = as_json
        self._end_s = None if seconds is None else time.monotonic() + seconds
        self._lost = ""
        """Why there is nothing more to watch, if that is an error."""
        self._lock = threading.Lock()
        self._requests = self._bytes = 0
        self._total = 0
        self._last_s = time.monotonic()
        self._longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="vdpabridge-guest", daemon=True)
        if not as_json:
            print(f"{device.name} as {kind}: requests whose data is checked, until Ctrl-C", flush=True)

    def answered(self, done_bytes: int) -> None:
        """A request was answered, and its data is right."""
        now_s = time.monotonic()
        with self._lock:
            self._requests += 1
            self._bytes += done_bytes
            self._longest_s = max(self._longest_s, now_s - self._last_s)
            self._last_s = now_s

    def __enter__(self) -> _Watch:
        # not SIGINT: a shell script starts its background processes with SIGINT ignored
        self._before = signal.signal(_WAKE, _over)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        signal.signal(_WAKE, self._before)

    def end(self) -> None:
        """Say what there is left to say. Raises `VdpaBridgeError` if the device is gone, OSError if nobody listens."""
        self._ended.set()
        self._thread.join()
        if self._lost:
            raise VdpaBridgeError("guest", device=self._device.name, why=self._lost)
        if not self._as_json:
            print(f"{self._total} requests, all right", flush=True)

    def _tell(self) -> None:
        """Watch until the end, and then wake the main thread up, which may be waiting for an answer."""
        # if nobody listens any more, `end` finds that out in the main thread
        with suppress(OSError):
            self._watch()
        if not self._ended.is_set():
            # a real signal: it ends a system call
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _watch(self) -> None:
        ended = False
        while not ended:
            left_s = 1.0 if self._end_s is None else max(0.0, min(1.0, self._end_s - time.monotonic()))
            ended = self._ended.wait(left_s)
            now_s = time.monotonic()
            if NOW.wait({self._device.fileno(): 0}):
                self._lost, ended = "the back-end is gone", True
            ended = ended or (self._end_s is not None and now_s >= self._end_s)
            with self._lock:
                requests, moved, longest_s = self._requests, self._bytes, self._longest_s
                silent_s = now_s - self._last_s
                self._requests, self._bytes, self._longest_s = 0, 0, 0.0
                self._total += requests
            self._say(requests, moved, longest_s, silent_s)

    def _say(self, requests: int, moved: int, longest_s: float, silent_s: float) -> None:
        if self._as_json:
            facts = {"requests": requests, "bytes": moved, "longest_pause_s": max(longest_s, silent_s)}
            print(json.dumps(facts), flush=True)
        elif requests:
            print(f"{requests} requests, {bytes_text(moved)}, longest pause {duration_text(longest_s)}", flush=True)
        else:
            print(f"no answer for {duration_text(silent_s)}", flush=True)


def _queues(device: Device, memory: GuestMemory, stack: ExitStack, count: int) -> list[SplitQueue]:
    """``count`` queues of ``device``, at work."""
    if device.identity.queue_count < count:
        why = f"it has {device.identity.queue_count} queue, and a file server at least {count}"
        raise UsageError("guest", device=device.name, why=why, hint="--as blk treats it as a disk")
    device.accept_features(1 << VIRTIO_F_VERSION_1)
    device.map([memory.region])
    queues = [stack.enter_context(SplitQueue(memory, _QUEUE_SIZE)) for _ in range(count)]
    stack.enter_context(_reset_at_the_end(device))
    for index, queue in enumerate(queues):
        queue.attach(device, index)
    device.start()
    return queues


@contextmanager
def _reset_at_the_end(device: Device) -> Iterator[None]:
    """The device has let go of the guest's memory before that is gone."""
    try:
        yield
    finally:
        device.close()


def _kind_of(device: Device) -> str:
    for kind, device_id in _KINDS.items():
        if device.identity.device_id == device_id:
            return kind
    if device.identity.device_id is not None:
        raise UsageError("guest", device=device.name, why="it is neither a disk nor a file server")
    own = device.offered_features & ((1 << _COMMON_FEATURES) - 1)
    return "blk" if own & ~_FS_F_NOTIFICATION else "fs"


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
