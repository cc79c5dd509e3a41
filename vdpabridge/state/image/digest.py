"""SHA-256 of data while it is transferred: a separate thread hashes large pieces."""

from __future__ import annotations

import hashlib
import threading
from queue import SimpleQueue

__all__ = ["Digest"]

#: Below this, handing over costs more than hashing.
_LARGE_BYTES = 1 << 18


class Digest:
    """A running SHA-256. Only one thread may update it. The caller must `close` it.

    A large piece is still read until the next `update` or `digest` returns: do not change it before.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: SimpleQueue[bytes | memoryview | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None

    def update(self, data: bytes | memoryview) -> None:
        """Add ``data``, after all that came before."""
        self._idle.wait()
        if len(data) < _LARGE_BYTES:
            self._digest.update(data)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vdpabridge-digest", daemon=True)
            self._thread.start()
        self._idle.clear()
        self._pieces.put(data)

    def digest(self) -> bytes:
        """The digest of all that was added."""
        self._idle.wait()
        return self._digest.digest()

    def close(self) -> None:
        """End the thread. Idempotent."""
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (data := self._pieces.get()) is not None:
            # without the interpreter's lock: the caller reads and writes meanwhile
            self._digest.update(data)
            self._idle.set()
