"""Moving state through a descriptor in a thread, so that the device answers meanwhile and can give up."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator

from .model import StateRefused

__all__ = ["Transfer"]

#: What a thread asks for at a time.
_READ_BYTES = 1 << 20
_GRACE_S = 1.0


class _Cancelled(Exception):
    pass


class Transfer:
    """Owns ``fd`` and a thread that runs ``work`` on this transfer; its `read` and `write` go through ``fd``.

    Any kind of descriptor will do: pipe, socket, file, memfd. It is closed when the work is done, before `finish`
    can return: the peer sees the end of the stream then.
    """

    def __init__(self, fd: int, work: Callable[[Transfer], None], *, stall_s: float = 0.0) -> None:
        self._fd = fd
        try:
            os.set_blocking(fd, False)
            self._cancel_read, self._cancel_write = os.pipe2(os.O_CLOEXEC)
        except BaseException:
            os.close(fd)
            raise
        self._error: BaseException | None = None
        self._buffer = bytearray()
        self._stall_s = stall_s
        self._work = work
        self._thread = threading.Thread(target=self._run, name="vdpabridge-sim-state", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float | None) -> None:
        """Wait for the work's end; raises what it raised, and TimeoutError after ``timeout_s``."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the work where it stands. Idempotent."""
        if self._cancel_write >= 0:
            os.close(self._cancel_write)
            self._cancel_write = -1
            # not for ever: the mode of the descriptor is the peer's too, who may have made writing block again
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
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:
                    continue

    def read(self, size_bytes: int) -> bytes:
        """``size_bytes``, fewer only where the writer has closed."""
        while len(self._buffer) < size_bytes:
            self._wait(select.POLLIN)
            try:
                came = os.read(self._fd, _READ_BYTES)
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
            self._work(self)
        except _Cancelled:
            self._error = StateRefused("the transfer was given up")
        except OSError as error:
            self._error = StateRefused(f"the other end of the transfer: {error.strerror}")
        except BaseException as error:  # noqa: BLE001  # whoever waits in finish() gets it
            self._error = error
        finally:
            os.close(self._fd)
            os.close(self._cancel_read)

    def _stall(self) -> None:
        end_s = time.monotonic() + self._stall_s
        poll = select.poll()
        poll.register(self._cancel_read, 0)
        while (left_s := end_s - time.monotonic()) > 0:
            if poll.poll(left_s * 1000):
                raise _Cancelled
