"""The back-end programs by themselves; with their peers they are tested in tests/peers."""

import signal
from contextlib import contextmanager

import pytest

from vdpabridge.cli import backend_programs


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_ends_it_unless_nohup_has_made_that_harmless(monkeypatch, ignored):
    seen = []

    @contextmanager
    def no_virtiofsd(_words):
        yield "sim:fs"

    def serve(_words):
        seen.append(signal.getsignal(signal.SIGHUP))
        return 0

    monkeypatch.setattr(backend_programs, "_virtiofsd", no_virtiofsd)
    monkeypatch.setattr(backend_programs, "command", serve)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        words = ["--shared-dir", "/", "--virtiofsd", "/bin/true", "--socket-path", "/nowhere"]
        assert backend_programs.fs(words) == 0
        assert (seen == [signal.SIG_IGN]) is ignored
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
