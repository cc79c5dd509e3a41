"""A guest in miniature: it checks what it reads, and says how long it had to wait."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ..support.waiting import wait_until
from .test_control import controlled
from .test_serve import COMMAND, ENVIRONMENT, is_served, run, serving


def lines_of(*words, seconds="1.2"):
    done = run("-j", "guest", *words, "--seconds", seconds)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("device", ["sim:fs", "sim:blk", "sim:blk,size=512", "sim:blk,size=4K"])
def test_devices_of_this_process(device):
    if device.endswith("size=512"):
        done = run("guest", device, "--seconds", "1")
        assert (done.returncode, "IOERR" in done.stderr) == (1, True), "less than a block"
        return
    told = lines_of(device)
    assert sum(each["requests"] for each in told) > 20
    assert all(set(each) == {"requests", "bytes", "longest_pause_s"} for each in told)


@pytest.mark.parametrize(("device", "kind"), [("sim:fs", "fs"), ("sim:blk", "blk")])
def test_what_it_is_is_told_from_its_features(device, kind, tmp_path):
    path = str(tmp_path / "s")
    with serving(device, "--socket-path", path):
        wait_until(lambda: is_served(path))
        done = run("guest", path, "--seconds", "1")
        assert done.returncode == 0, done.stderr
        said = done.stdout.splitlines()
        assert said[0] == f"{path} as {kind}: requests whose data is checked, until Ctrl-C"
        assert said[-1].endswith(" requests, all right")


def test_a_disk_is_not_written_unless_that_is_asked_for(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(1 << 20))
    before = disk.read_bytes()
    lines_of(f"sim:blk,file={disk}")
    assert disk.read_bytes() == before
    lines_of(f"sim:blk,file={disk}", "--write")
    assert disk.read_bytes() != before


def test_data_that_changes_by_itself_is_noticed(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    words = [*COMMAND, "guest", f"sim:blk,file={disk}", "--seconds", "20"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout.readline()
        assert process.stdout.readline()
        # without a moment in which it is shorter
        with disk.open("r+b") as file:
            file.write(b"x" * 4096)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "block 0 is not what it was" in said


def test_a_pause_is_seen(tmp_path):
    with controlled(tmp_path) as (path, control, _):
        words = [*COMMAND, "-j", "guest", path]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
            assert json.loads(process.stdout.readline())["requests"]
            assert run("suspend", control).returncode == 0
            time.sleep(1.2)
            assert run("resume", control).returncode == 0
            longest_s = 0.0
            deadline_s = time.monotonic() + 10
            while longest_s < 1 and time.monotonic() < deadline_s:
                longest_s = max(longest_s, json.loads(process.stdout.readline())["longest_pause_s"])
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
        assert longest_s > 1
        assert process.returncode == 0
        status = json.loads(run("-j", "status", control).stdout)
        assert (status["state"], status["front_end"]) == ("suspended", False)


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["sim:blk", "--as", "fs"], 2, "it has 1 queue, and a file server at least 2"),
        (["sim:fs", "--write"], 2, "--write is for a disk"),
        (["/nowhere"], 1, "/nowhere"),
        (["sim:fs", "--seconds", "0"], 2, "is not a number of seconds"),
    ],
)
def test_what_makes_no_sense(words, code, why):
    done = run("guest", *words)
    assert (done.returncode, why in done.stderr) == (code, True), done.stderr


def test_it_ends_in_time_although_nobody_answers(tmp_path):
    with controlled(tmp_path) as (path, control, _):
        words = [*COMMAND, "guest", path, "--seconds", "2.5"]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        ) as process:
            process.stdout.readline()
            process.stdout.readline()
            assert run("suspend", control).returncode == 0
            said, problems = process.communicate(timeout=20)
        assert (process.returncode, problems) == (0, "")
        assert said.splitlines()[-1].endswith("all right")


def test_it_ends_although_its_shell_has_made_it_ignore_ctrl_c(tmp_path):
    """A shell script does so for each command with "&"."""
    words = [*COMMAND, "guest", "sim:fs", "--seconds", "1.2"]
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *words]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=20, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("all right")
    counted = sum(int(line.split()[0]) for line in lines[1:-1] if line.endswith(("ms", "us", "s")))
    assert lines[-1] == f"{counted} requests, all right"


@pytest.mark.parametrize("seconds", ["0.00001", "0.001", "0.01"])
def test_an_end_that_comes_at_once(seconds):
    for _ in range(3):
        done = run("guest", "sim:fs", "--seconds", seconds)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_back_end_that_is_gone(tmp_path):
    with controlled(tmp_path) as (path, _, server):
        words = [*COMMAND, "guest", path]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        ) as process:
            process.stdout.readline()
            process.stdout.readline()
            server.kill()
            said, problems = process.communicate(timeout=20)
        assert process.returncode == 1
        assert problems.count("\n") == 1
        assert "gone" in problems or "closed" in problems
        assert "all right" not in said


def test_a_reader_that_leaves():
    done = subprocess.run(
        f"{sys.executable} -m vdpabridge guest sim:fs | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=20,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
