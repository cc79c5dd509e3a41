"""The command line: errors in one line, exit codes from the table, JSON, and no slow imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vdpabridge.cli import backend_programs, files, main
from vdpabridge.cli.exit_codes import TABLE, exit_code
from vdpabridge.errors import DeadlineExceeded, MissingCapability, UsageError, VdpaBridgeError


def test_no_vdpa_in_this_kernel(capsys, monkeypatch):
    from vdpabridge.bus import bus

    monkeypatch.setattr(bus.Bus.__init__, "__defaults__", ("/nonexistent", "/dev"))
    assert main(["list"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vdpabridge: vDPA bus: this kernel has none loaded (")
    assert err.count("\n") == 1
    assert main(["-j", "list"]) == 1
    assert json.loads(capsys.readouterr().err)["error"]["why"] == "this kernel has none loaded"


def test_list_of_a_made_up_bus(capsys, monkeypatch, tmp_path):
    from vdpabridge.bus import bus

    folder = tmp_path / "bus/vdpa/devices/d0"
    (folder / "vhost-vdpa-0").mkdir(parents=True)
    (folder / "driver").symlink_to("../../drivers/vhost_vdpa")
    monkeypatch.setattr(bus.Bus.__init__, "__defaults__", (str(tmp_path), "/dev"))
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "NAME  DRIVER      NODE\nd0    vhost_vdpa  /dev/vhost-vdpa-0\n"
    assert main(["list", "-j"]) == 0
    assert capsys.readouterr().out == '{"dev":{"d0":{"driver":"vhost_vdpa","path":"/dev/vhost-vdpa-0"}}}\n'
    assert main(["-j", "-p", "list"]) == 0
    assert capsys.readouterr().out.startswith('{\n    "dev": {\n        "d0": {')


@pytest.mark.parametrize("words", [[], ["nonsense"], ["add", "d0"], ["bind", "d0"]])
def test_wrong_usage_is_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: vdpabridge" in capsys.readouterr().err


@pytest.mark.parametrize("timeout", ["-1", "0", "nan", "inf", "soon", "1e300", "1000001"])
def test_a_time_that_is_none(timeout, capsys):
    for words in (["status", "x"], ["serve", "sim:fs", "--socket-path", "x"]):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--timeout", timeout])
        assert caught.value.code == 2
        assert f"'{timeout}' is not a number of seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "sim:fs", "--socket-path", ""],
        ["serve", "sim:fs", "--socket-path", "x", "--control", ""],
        ["status", ""],
        ["save", "x", ""],
        ["migrate", "x", "y", "--report", ""],
        ["inspect", ""],
    ],
)
def test_a_path_that_is_none(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "a path has at least one character" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["-j", "nonsense"], ["-jj", "nonsense"], ["bind", "d0", "-j"], ["-j", "status", "x", "--timeout", "0"]]
)
def test_wrong_usage_as_json(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert json.loads(capsys.readouterr().err)["error"]["what"].startswith("vdpabridge")


@pytest.mark.parametrize(
    ("program", "option"), [(backend_programs.blk, "--blk-file"), (backend_programs.fs, "--shared-dir")]
)
def test_programs_for_management_software_want_a_place_and_something_to_serve(program, option, capsys):
    for words in ([option, "x"], ["--socket-path", "x"], ["--socket-path", "", option, "x"]):
        with pytest.raises(SystemExit) as caught:
            program(words)
        assert caught.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["dev", "show", "blk0"], "vdpabridge show blk0"),
        (["dev", "add", "name", "x"], "vdpabridge add name x"),
        (["-j", "dev"], "vdpabridge list"),
        (["mgmtdev", "show"], "vdpabridge show --mgmtdev"),
    ],
)
def test_who_knows_iproute2_is_told_what_things_are_called(words, instead, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert f"try '{instead}'" in capsys.readouterr().err


def test_help_shows_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert ", ".join(f"{code} {meaning}" for code, meaning in TABLE.items()) in out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VdpaBridgeError("x"), 1),
        (UsageError("x"), 2),
        (MissingCapability("d", "x", "RESUME", "y"), 3),
        (DeadlineExceeded("x", 1), 5),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code
    assert code in TABLE


ROOT = Path(__file__).resolve().parent.parent.parent


def run(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, **options)


def test_udev_rules_are_printed():
    rules = run("-m", "vdpabridge", "udev-rules")
    assert 'DRIVER=="vhost_vdpa", RUN+="/usr/lib/vdpabridge/vdpa-node add %k %S%p"' in rules.stdout
    helper = run("-m", "vdpabridge", "udev-rules", "--helper")
    assert helper.stdout.startswith("#!/bin/sh\n")


def test_list_imports_nothing_slow(tmp_path):
    """pyroute2 and cffi cost more than all the rest."""
    (tmp_path / "bus/vdpa/devices/d0").mkdir(parents=True)
    script = (
        "import sys; from vdpabridge.cli import main; from vdpabridge.bus.bus import Bus;"
        f"Bus.__init__.__defaults__ = ({str(tmp_path)!r}, '/dev'); assert main(['list']) == 0; print(*sys.modules)"
    )
    modules = run("-c", script).stdout.split()
    assert "vdpabridge.bus.bus" in modules
    slow = {
        "pyroute2",
        "cffi",
        "_cffi_backend",
        "ctypes",
        "ioctl_opt",
        "asyncio",
        "inspect",
        "json",
        "pathlib",
        "logging",
    }
    slow |= {"dataclasses", "typing", "socket", "shutil", "subprocess"}
    assert slow & set(modules) == set()


def test_a_reader_that_leaves_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m vdpabridge udev-rules | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr


def test_output_that_cannot_be_written():
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vdpabridge", "udev-rules"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"vdpabridge: udev-rules: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("closed", "words", "code", "said"),
    [
        (1, "udev-rules", 1, "Bad file descriptor"),
        (0, "inspect -", 1, "Bad file descriptor"),
        (2, "list", 1, ""),
        (2, "udev-rules", 0, ""),
    ],
)
def test_standard_descriptors_that_are_closed(closed, words, code, said):
    done = run(
        "-c",
        f"import os; os.close({closed}); os.execv({sys.executable!r}, ['python', '-m', 'vdpabridge', *{words.split()!r}])",
    )
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistake_of_ours_is_no_traceback_either(capsys, monkeypatch):
    def wrong(_words):
        raise TypeError("something")

    monkeypatch.setattr(files, "udev_rules", wrong)
    assert main(["udev-rules"]) == 1
    assert capsys.readouterr().err == (
        "vdpabridge: udev-rules: TypeError: something (a mistake in vdpabridge: VDPABRIDGE_TRACEBACK=1 shows where)\n"
    )
    monkeypatch.setenv("VDPABRIDGE_TRACEBACK", "1")
    with pytest.raises(TypeError):
        main(["udev-rules"])


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["status", "--help"]])
def test_help_that_cannot_be_printed(words):
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vdpabridge", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "vdpabridge: standard output: No space left on device\n")


def test_descriptors_that_are_none(capsys):
    for word in ("99999999999999", "-1", "x"):
        with pytest.raises(SystemExit) as caught:
            main(["serve", "sim:fs", f"--fd={word}"])
        assert caught.value.code == 2
        assert f"'{word}' is not the number of a descriptor" in capsys.readouterr().err


def test_the_rules_and_the_demonstration_as_json():
    rules = json.loads(run("-m", "vdpabridge", "-j", "udev-rules").stdout)["rules"]
    assert rules == run("-m", "vdpabridge", "udev-rules").stdout
    lines = [json.loads(line) for line in run("-m", "vdpabridge", "-j", "demo").stdout.splitlines()]
    assert lines[-1] == {"demo": "PASS"}
    assert all(set(line) == {"step", "at_ms", "took_ms", "facts"} for line in lines[:-1])


PARTS = """
import sys
from vdpabridge.cli.commands import _netlink
netlink = _netlink()
assert netlink.__name__ == "VdpaNetlink"
from vdpabridge.errors import NoSuchDevice
try:
    netlink()
except NoSuchDevice:
    pass  # the kernel has no such family, and has said so
assert not any(name in sys.modules for name in ("pyroute2.ndb", "pyroute2.ndb.main", "pyroute2.conntrack"))
"""


def test_commands_import_only_the_parts_of_pyroute2_that_they_use():
    done = run("-c", PARTS, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
