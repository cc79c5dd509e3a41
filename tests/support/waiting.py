"""Waiting for what another thread or process does."""

import os
import time


def wait_until(condition, timeout_s=30):
    """Return when ``condition()`` is true; an AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def signalled(eventfd):
    """Whether a non-blocking ``eventfd`` was signalled; clears it."""
    try:
        return os.eventfd_read(eventfd) > 0
    except BlockingIOError:
        return False
