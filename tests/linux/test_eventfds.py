"""Nobody who shares an eventfd can make this process wait."""

import os
import subprocess
import sys
import threading

import pytest

from vdpabridge.linux import eventfds
from vdpabridge.linux.eventfds import clear, signal, wake

from ..support.transitions import eventfd

FULL = 0xFFFF_FFFF_FFFF_FFFE


def test_signal_adds_one():
    with eventfd() as event:
        for _ in range(1000):
            signal(event)
        assert os.eventfd_read(event) == 1000


def test_a_full_counter_keeps_nobody():
    """A blocking eventfd, which write(2) would wait for."""
    event = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(event, FULL)
    signal(event)
    signal(event)
    clear(event)
    signal(event)
    assert os.eventfd_read(event) == 1
    os.close(event)


def test_many_threads():
    with eventfd() as event:
        threads = [threading.Thread(target=lambda: [signal(event) for _ in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.eventfd_read(event) == 2000


def test_without_asynchronous_io(monkeypatch):
    monkeypatch.setattr(eventfds, "_signaller", lambda _pid: None)
    with eventfd() as event:
        signal(event)
        assert os.eventfd_read(event) == 1
        os.eventfd_write(event, FULL)
        signal(event)
        assert os.eventfd_read(event) == FULL


def test_a_fork_signals_too():
    text = """
import os
from vdpabridge.linux.eventfds import signal
event = os.eventfd(0)
signal(event)
if os.fork() == 0:
    signal(event)
    os._exit(0)
os.wait()
print(os.eventfd_read(event))
"""
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, check=True, text=True).stdout == "2\n"


def test_nothing_to_signal():
    signal(None)


def test_waking_with_a_full_counter():
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    wake(event)
    assert os.eventfd_read(event) == 1
    os.eventfd_write(event, FULL)
    wake(event)
    assert os.eventfd_read(event) == FULL
    os.close(event)


def test_clear_does_not_wait():
    event = os.eventfd(0, os.EFD_CLOEXEC)
    clear(event)
    signal(event)
    clear(event)
    clear(event)
    os.close(event)


def test_what_is_no_eventfd():
    """As whoever passes one finds out when it is received: nothing is written into it."""
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        signal(writer)
    os.close(reader)
    os.close(writer)
