"""The command line: errors in one line, exit codes from the table, JSON, and no slow imports."""

import json
import subprocess
import sys

import pytest

from vdpabridge.cli import main
from vdpabridge.cli.exit_codes import TABLE, exit_code
from vdpabridge.errors import DeadlineExceeded, MissingCapability, VdpaBridgeError


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


def test_help_shows_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert ", ".join(f"{code} {meaning}" for code, meaning in TABLE.items()) in out


@pytest.mark.parametrize(
    ("error", "code"),
    [(VdpaBridgeError("x"), 1), (MissingCapability("d", "x", "RESUME", "y"), 3), (DeadlineExceeded("x", 1), 5)],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code
    assert code in TABLE


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
