"""How runs end, told apart: from made-up reports here, from real machines in test_runner.py."""

import os
import signal
from pathlib import Path

import pytest
from vmimages import qemu
from vmimages.cache import cache_root, cached, content_key
from vmimages.host import HostError, command
from vmimages.kernel import _check_config
from vmimages.outcome import Outcome, judge

from ..support.waiting import wait_until

PANIC = "[ 1.0] fine\n[ 2.0] Kernel panic - not syncing: Attempted to kill init!\n[ 2.1] CPU: 0\n"
OOPS = "[ 1.0] BUG: kernel NULL pointer dereference, address: 0000000000000000\n[ 1.1] Oops: 0000\n"

ROWS = [
    ("started\nexit 0\n", "", 0, Outcome.FINISHED, 0),
    ("started\nexit 7\n", "", 0, Outcome.FINISHED, 7),
    ("started\nexit 3\n", PANIC, 0, Outcome.FINISHED, 3),
    ("started\nexit 0\n", "[ 1.0] WARNING: CPU: 0 PID: 1 at kernel/x.c:1\n", 0, Outcome.COMPLAINT, 123),
    ("started\nexit 0\n", "[ 9.0] INFO: task vdpa:7 blocked for more than 120 seconds.\n", 0, Outcome.COMPLAINT, 123),
    ("started\nexit 0\n", "[ 9.0] rcu: INFO: rcu_sched self-detected stall on CPU\n", 0, Outcome.COMPLAINT, 123),
    ("started\nexit 0\n", "[ 9.0] Oops: general protection fault: 0000 [#1]\n", 0, Outcome.COMPLAINT, 123),
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
        cached("kind", "key", fails, has=["result"])
    assert [path.name for path in (tmp_path / "kind").iterdir()] == [".key.lock"]
    calls = []

    def builds(work):
        calls.append(work)
        (work / "result").write_text("whole")
        return {"version": "1"}

    for _ in range(2):
        assert (cached("kind", "key", builds, has=["result"]) / "result").read_text() == "whole"
    assert len(calls) == 1


def builder(text):
    def build(work):
        (work / "result").write_text(text)
        return {}

    return build


def test_cache_entries_that_are_not_whole_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VDPABRIDGE_CACHE", str(tmp_path))
    entry = cached("kind", "key", builder("one"), has=["result"])
    for missing in ("facts.json", "result"):
        (entry / missing).unlink()
        assert cached("kind", "key", builder(missing), has=["result"]) == entry
        assert (entry / "result").read_text() == missing
    entry.with_name(".key.killed").mkdir()
    (entry / "result").unlink()
    cached("kind", "key", builder("two"), has=["result"])
    assert sorted(path.name for path in entry.parent.iterdir()) == [".key.lock", "key"]


def test_a_cache_entry_stays_until_there_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("VDPABRIDGE_CACHE", str(tmp_path))
    entry = cached("kind", "key", builder("old"), has=["result"])

    def offline(_work):
        raise HostError("no network")

    with pytest.raises(HostError):
        cached("kind", "key", offline, has=["result"], again=True)
    assert (entry / "result").read_text() == "old"
    cached("kind", "key", builder("new"), has=["result"], again=True)
    assert (entry / "result").read_text() == "new"
    assert sorted(path.name for path in entry.parent.iterdir()) == [".key.lock", "key"]


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VDPABRIDGE_CACHE", "here")
    assert cache_root() == tmp_path / "here"
    for character in " ,:":
        monkeypatch.setenv("VDPABRIDGE_CACHE", f"/x{character}y")
        with pytest.raises(ValueError, match="no space, comma or colon"):
            cache_root()


def test_a_verdict_on_kvm_that_is_none_is_found_out_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VDPABRIDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(qemu, "_boots_on_kvm", lambda _kernel: True)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / f"kvm-{boot_id}").touch()
    assert qemu.accelerator(Path("kernel")) == "kvm"
    assert (tmp_path / f"kvm-{boot_id}").read_text() == "kvm"


def test_an_interrupted_command_takes_its_children_with_it(tmp_path):
    script = f"sh -c 'sleep 1000 & echo $! >{tmp_path}/pid; wait'"

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            command(["sh", "-c", script])
    finally:
        signal.signal(signal.SIGALRM, before)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not os.path.exists(f"/proc/{pid}/exe"))


KCONFIG = "config SYSCTL\nconfig VDPA\n    menuconfig NET\n"


@pytest.mark.parametrize(
    ("fragment", "config", "refused"),
    [
        ("CONFIG_NET=y", "CONFIG_NET=y", None),
        ("CONFIG_NET=y", "", "CONFIG_NET=y"),
        ("CONFIG_NET=m", "CONFIG_NET=y", "CONFIG_NET=m"),
        ("CONFIG_SYSCTL=20", "CONFIG_SYSCTL=10", "CONFIG_SYSCTL=20"),
        ("# CONFIG_NET is not set\nCONFIG_SYSCTL=n", "", None),
        ("CONFIG_PROC_SYSCTL=y", "", None),
        ("CONFIG_VDPA_SIM=y", "", "CONFIG_VDPA_SIM=y"),
    ],
)
def test_symbols_that_a_tree_does_not_grant(tmp_path, capsys, fragment, config, refused):
    """What it does not know is told, unless nothing can be tested without it."""
    (tmp_path / "Kconfig").write_text(KCONFIG)
    (tmp_path / "fragment").write_text(fragment + "\n")
    if refused is None:
        _check_config(tmp_path / "fragment", config, tmp_path)
        assert ("does not know CONFIG_PROC_SYSCTL=y" in capsys.readouterr().err) == ("PROC_SYSCTL" in fragment)
        return
    with pytest.raises(HostError, match=refused):
        _check_config(tmp_path / "fragment", config, tmp_path)


def test_keys_depend_on_every_part(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert content_key("ab", "c") != content_key("a", "bc")
    before = content_key(file)
    file.write_text("y")
    assert content_key(file) != before
