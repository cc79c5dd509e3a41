"""How runs end, told apart: from made-up reports here, from real machines in test_runner.py."""

import pytest
from vmimages.cache import cached, content_key
from vmimages.outcome import Outcome, judge

PANIC = "[ 1.0] fine\n[ 2.0] Kernel panic - not syncing: Attempted to kill init!\n[ 2.1] CPU: 0\n"
OOPS = "[ 1.0] BUG: kernel NULL pointer dereference, address: 0000000000000000\n[ 1.1] Oops: 0000\n"

ROWS = [
    ("started\nexit 0\n", "", 0, Outcome.FINISHED, 0),
    ("started\nexit 7\n", "", 0, Outcome.FINISHED, 7),
    ("started\nexit 3\n", PANIC, 0, Outcome.FINISHED, 3),
    ("started\nexit 0\n", "[ 1.0] WARNING: CPU: 0 PID: 1 at kernel/x.c:1\n", 0, Outcome.COMPLAINT, 123),
    ("started\nexit 0\n", "[ 9.0] INFO: task vdpa:7 blocked for more than 120 seconds.\n", 0, Outcome.COMPLAINT, 123),
    ("started\n", PANIC, 0, Outcome.PANIC, 125),
    ("started\n", OOPS, None, Outcome.PANIC, 125),
    ("started\n", "[ 1.0] quiet\n", None, Outcome.TIME_LIMIT, 124),
    ("", "", None, Outcome.TIME_LIMIT, 124),
    ("", "", 1, Outcome.NO_GUEST, 126),
    ("started\nexit", "", 0, Outcome.NO_GUEST, 126),
]


@pytest.mark.parametrize(("status", "log", "qemu", "outcome", "code"), ROWS)
def test_outcomes(status, log, qemu, outcome, code):
    result = judge(status, log, qemu, "", 1.0)
    assert (result.outcome, result.exit_code) == (outcome, code)
    assert bool(result.why) == (outcome is not Outcome.FINISHED)


def test_reasons_say_what_a_person_needs():
    assert "Attempted to kill init" in judge("started\n", PANIC, 0, "", 1).why
    assert "no end after 9 s (the command had begun)" in judge("started\n", "x\n", None, "", 9).why
    assert "could not open disk" in judge("", "", 1, "qemu: could not open disk", 1).why


def test_cache_entries_are_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("VDPABRIDGE_CACHE", str(tmp_path))

    def fails(work):
        (work / "half").write_text("half")
        raise RuntimeError("no disk space")

    with pytest.raises(RuntimeError):
        cached("kind", "key", fails)
    assert [path.name for path in (tmp_path / "kind").iterdir()] == [".key.lock"]
    calls = []

    def builds(work):
        calls.append(work)
        (work / "result").write_text("whole")
        return {"version": "1"}

    for _ in range(2):
        assert (cached("kind", "key", builds) / "result").read_text() == "whole"
    assert len(calls) == 1


def test_keys_depend_on_every_part(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert content_key("ab", "c") != content_key("a", "bc")
    before = content_key(file)
    file.write_text("y")
    assert content_key(file) != before
