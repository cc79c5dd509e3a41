"""Moves state through a descriptor in a thread, so that the device answers meanwhile and can give up."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from ...linux.descriptors import discard
from .model import Loaded, StateRefused

__all__ = ["Transfer"]

#: How much a thread reads at a time.
_READ_BYTES = 1 << 20
_GRACE_S = 1.0


class _Cancelled(Exception):
    pass


class Transfer:
    """Owns ``fd`` and a thread that runs ``work`` on this transfer; its `read` and `write` go through ``fd``.

    Any kind of descriptor will do: pipe, socket, file, memfd. It is closed when the work is done, before `finish`
    can return: the peer sees the end of the stream then. Raises `StateRefused` if it cannot be used.
    """

    def __init__(self, fd: int, work: Callable[[Transfer], Loaded | None], *, stall_s: float = 0.0) -> None:
        try:
            self._fd = _without_waiting(fd)
            try:
                self._cancel_read, self._cancel_write = os.pipe2(os.O_CLOEXEC)
            except BaseException:
                discard([self._fd])
                raise
        except OSError as error:
            raise StateRefused(f"its descriptor: {error.strerror}") from error
        is_socket = stat.S_ISSOCK(os.fstat(self._fd).st_mode)
        self._read_some: Callable[[int], bytes] = partial(_receive if is_socket else os.read, self._fd)
        self._write_some: Callable[[memoryview], int] = partial(_send if is_socket else os.write, self._fd)
        self._lock = threading.Lock()
        self._given_up = False
        self._result: Loaded | None = None
        self._error: BaseException | None = None
        self._buffer = bytearray()
        self._stall_s = stall_s
        self._work = work
        self._thread = threading.Thread(target=self._run, name="vdpabridge-sim-state", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float | None) -> Loaded | None:
        """Wait for the work's end. Returns its result, which the caller owns from now on.

        Raises what the work raised, and TimeoutError after ``timeout_s``.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError
        if self._error is not None:
            raise self._error
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """End the work at once, and drop its result, now or when it comes. Idempotent."""
        with self._lock:
            self._given_up = True
            result, self._result = self._result, None
        if result is not None:
            result.discard()
        if self._cancel_write >= 0:
            os.close(self._cancel_write)
            self._cancel_write = -1
            # not for ever: the server of a file may make it wait
            self._thread.join(_GRACE_S)

    # --- for the work ---

    def write(self, chunks: Iterator[bytes], limit_bytes: int | None = None) -> None:
        """Write ``chunks``, no more than ``limit_bytes`` of them."""
        left = limit_bytes
        for chunk in chunks:
            rest = memoryview(chunk if left is None else chunk[:left])
            left = None if left is None else left - len(rest)
            while rest:
                self._wait(select.POLLOUT)
                try:
                    rest = rest[self._write_some(rest) :]
                except BlockingIOError:
                    continue

    def read(self, size_bytes: int) -> bytes:
        """``size_bytes``, fewer only if the writer has closed."""
        while len(self._buffer) < size_bytes:
            self._wait(select.POLLIN)
            try:
                came = self._read_some(_READ_BYTES)
            except BlockingIOError:
                continue
            if not came:
                break
            self._buffer += came
        data = bytes(self._buffer[:size_bytes])
        del self._buffer[:size_bytes]
        return data

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._fd, events)
        poll.register(self._cancel_read, 0)
        for fd, _ in poll.poll():
            if fd == self._cancel_read:
                raise _Cancelled

    def _run(self) -> None:
        try:
            self._stall()
            self._keep(self._work(self))
        except _Cancelled:
            self._error = StateRefused("the transfer was given up")
        except OSError as error:
            self._error = StateRefused(f"the other end of the transfer: {error.strerror}")
        except BaseException as error:  # noqa: BLE001  # finish() raises it
            self._error = error
        finally:
            discard([self._fd])
            os.close(self._cancel_read)

    def _keep(self, result: Loaded | None) -> None:
        with self._lock:
            if not self._given_up:
                self._result = result
                return
        if result is not None:
            result.discard()

    def _stall(self) -> None:
        end_s = time.monotonic() + self._stall_s
        poll = select.poll()
        poll.register(self._cancel_read, 0)
        while (left_s := end_s - time.monotonic()) > 0:
            if poll.poll(left_s * 1000):
                raise _Cancelled


def _without_waiting(fd: int) -> int:
    """Take ownership of ``fd``, and return a descriptor in its place that does not make its user wait.

    All processes that share an open file share its mode, so the peer could make it blocking again at any time. So this
    opens a pipe again, for a mode of its own. A socket is asked not to wait at each call. Raises OSError.
    """
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_PATH:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            return fd
        access = flags & os.O_ACCMODE
        try:
            own = os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError:
            # another user made the pipe
            os.set_blocking(fd, False)
            return fd
    except BaseException:
        discard([fd])
        raise
    discard([fd])
    return own


def _receive(fd: int, size_bytes: int) -> bytes:
    with socket.socket(fileno=os.dup(fd)) as duplicate:
        return duplicate.recv(size_bytes, socket.MSG_DONTWAIT)


def _send(fd: int, data: memoryview) -> int:
    with socket.socket(fileno=os.dup(fd)) as duplicate:
        return duplicate.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
