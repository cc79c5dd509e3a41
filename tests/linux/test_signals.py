"""Signals that wait until something is done: none is lost, none comes twice, and the handlers are as they were."""

import os
import signal
import threading
from contextlib import contextmanager

import pytest

from vdpabridge.linux.signals import harmless, uninterrupted


class Came(Exception):
    """Raised by a handler."""


@contextmanager
def handlers(**by_name):
    before = {name: signal.signal(getattr(signal, name), handler) for name, handler in by_name.items()}
    try:
        yield
        assert {name: signal.getsignal(getattr(signal, name)) for name in by_name} == by_name
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def test_both_come_afterwards_and_once():
    seen = []

    def raising(number, _frame):
        seen.append(number)
        raise Came

    def noting(number, _frame):
        seen.append(number)

    def body():
        with uninterrupted(), uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []

    with handlers(SIGINT=raising, SIGTERM=noting):
        with pytest.raises(Came):
            body()
        assert sorted(seen) == [signal.SIGINT, signal.SIGTERM]


def test_one_that_comes_while_handlers_are_put_back_leaves_no_other_behind(monkeypatch):
    def raising(_number, _frame):
        raise Came

    install = signal.signal
    calls = []

    def interrupted(number, handler):
        calls.append(number)
        install(number, handler)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def body():
        with uninterrupted():
            pass

    with handlers(SIGINT=raising, SIGTERM=raising):
        monkeypatch.setattr(signal, "signal", interrupted)
        with pytest.raises(Came):
            body()
        monkeypatch.undo()


def test_what_raises_nothing_need_not_wait():
    seen = []

    @harmless
    def note(number, _frame):
        seen.append(number)

    with handlers(SIGTERM=note), uninterrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]


def test_ignored_ones_stay_so():
    with handlers(SIGINT=signal.SIG_IGN), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_need_none_of_it():
    with handlers(SIGINT=signal.default_int_handler):
        thread = threading.Thread(target=lambda: uninterrupted().__enter__())
        thread.start()
        thread.join()
