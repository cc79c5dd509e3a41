"""Real machines that finish, fail, hang and panic. They boot the default kernel, which is built where it is missing."""

import contextlib
import fcntl
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from vmimages import runner
from vmimages.host import HostError
from vmimages.kernel import DEFAULT_KERNEL, kernel
from vmimages.outcome import Outcome
from vmimages.runner import run

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def bootable():
    try:
        return kernel(DEFAULT_KERNEL)
    except HostError as error:
        pytest.skip(f"no test machine: {error}")


def boot(bootable, script, **options):
    output = io.BytesIO()
    result = run(bootable, ["sh", "-c", script], repository=REPOSITORY, output=output, **options)
    return result, output.getvalue().decode()


def test_output_and_exit_code(bootable):
    script = "echo out; echo err >&2; uname -r; echo $GREETING; test -e vdpabridge/device/interface.py && id -u; exit 7"
    result, output = boot(bootable, script, environment={"GREETING": "it's $HOME"})
    assert (result.outcome, result.exit_code) == (Outcome.FINISHED, 7)
    words = output.splitlines()
    assert words[:2] == ["out", "err"]
    assert words[2].startswith(DEFAULT_KERNEL + ".")
    assert words[3:] == ["it's $HOME", "0"]
    assert "Linux version" in result.kernel_log


def test_much_output_arrives_whole(bootable):
    result, output = boot(bootable, "seq 200000")
    assert result.exit_code == 0
    assert output == "".join(f"{number}\n" for number in range(1, 200001))


def test_a_panic_is_told_from_a_hang(bootable):
    result, _ = boot(bootable, "echo c > /proc/sysrq-trigger; sleep 60")
    assert (result.outcome, result.exit_code) == (Outcome.PANIC, 125)
    assert "sysrq" in result.why


def test_a_hang_meets_the_time_limit(bootable):
    result, output = boot(bootable, "echo before; sleep 1000", time_limit_s=15)
    assert (result.outcome, result.exit_code) == (Outcome.TIME_LIMIT, 124)
    assert output == "before\n"
    assert "the command had begun" in result.why


def test_the_time_limit_holds_while_output_flows(bootable):
    result, output = boot(bootable, "yes", time_limit_s=15)
    assert result.outcome is Outcome.TIME_LIMIT
    assert output.startswith("y\ny\n")
    assert result.elapsed_s < 20


def test_a_kernel_warning_is_no_success(bootable):
    script = "echo 'WARNING: made up' > /dev/kmsg; sleep 0.2; exit 0"
    result, _ = boot(bootable, script)
    assert (result.outcome, result.exit_code) == (Outcome.COMPLAINT, 123)


def test_the_machine_ends_with_its_runner(bootable):
    """Whatever ends the runner, SIGKILL too: no QEMU is left."""
    command = [sys.executable, "-m", "vmimages", DEFAULT_KERNEL, "--", "sh", "-c", "echo here; sleep 1000"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "vm-images")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as runner:
        assert runner.stdout.readline() == b"here\n"
        machines = children_of(runner.pid)
        assert len(machines) == 1
        runner.kill()
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{machines[0]}/exe") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{machines[0]}/exe")


def children_of(pid):
    """Child processes, by their parent's number: not every kernel lists them."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as stat:
                if int(stat.read().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry))
    return found


def test_a_machine_that_ends_by_itself(bootable):
    result, _ = boot(bootable, "echo o > /proc/sysrq-trigger; sleep 60", time_limit_s=60)
    assert (result.outcome, result.exit_code) == (Outcome.NO_GUEST, 126)


# --- nothing runs, and that is no success ---


def vm(*words, **options):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "vm-images")}
    command = [sys.executable, "-m", "vmimages", *words]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, check=False, **options)


def test_a_payload_that_does_not_fit(bootable, tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(1 << 20) * 300)
    result, output = boot(bootable, "echo never", extra=[tmp_path / "large"], memory_mib=256)
    assert (result.outcome, result.exit_code, output) == (Outcome.PANIC, 125, "")
    assert "does not fit into this machine: give it more memory" in result.kernel_log


def test_a_suite_that_does_not_say_what_it_tested(bootable):
    done = vm(DEFAULT_KERNEL, "--", "true", "tests.ktap", stdout=subprocess.DEVNULL)
    assert done.returncode == 122
    assert "but tested nothing" in done.stderr


def test_output_that_nobody_takes(bootable):
    with open("/dev/full", "wb") as full:
        done = vm(DEFAULT_KERNEL, "--", "echo", "x", stdout=full)
    assert (done.returncode, done.stderr) == (122, "vm-images: the output cannot be written: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = vm(DEFAULT_KERNEL, "--", "yes", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (122, "vm-images: the output cannot be written: Broken pipe\n")


def test_the_time_limit_does_not_wait_for_a_reader(bootable):
    reader, writer = os.pipe()
    begin_s = time.monotonic()
    done = vm(DEFAULT_KERNEL, "--time-limit", "12", "--", "yes", stdout=writer)
    assert time.monotonic() - begin_s < 60
    os.close(reader)
    os.close(writer)
    assert done.returncode == 124


def test_a_log_that_cannot_be_kept_does_not_change_the_result(bootable):
    done = vm(DEFAULT_KERNEL, "--kernel-log", "/dev/full", "--", "sh", "-c", "exit 7", stdout=subprocess.DEVNULL)
    assert done.returncode == 7
    assert "the kernel's log is lost" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--env", "$(touch /tmp/x)=y"],
        ["--env", "1A=b"],
        ["--env", "nothing"],
        ["--time-limit", "0"],
        ["--time-limit", "nan"],
        ["--memory", "1"],
        [DEFAULT_KERNEL, "--config", "/dev/null"],
        ["--nonsense"],
        ["--test", "suspend", "--", "true"],
        ["--list", "--", "true"],
    ],
)
def test_wrong_usage_is_not_the_commands_exit_code(words):
    assert vm(*words).returncode == 120


def test_a_part_of_the_suite(bootable):
    words = (DEFAULT_KERNEL, "--test", "test_a_reset_ends_a_suspend or test_a_second_suspend")
    listed = vm(*words, "--list", stdout=subprocess.PIPE)
    assert listed.returncode == 0
    assert listed.stdout.split()[:2] == [
        "tests/vm/test_promises.py::test_a_second_suspend_changes_nothing",
        "tests/vm/test_promises.py::test_a_reset_ends_a_suspend",
    ]
    done = vm(*words, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert "# Totals: pass:2 fail:0" in done.stdout
    assert done.stdout.count("KTAP version") == 1


def test_a_filter_that_nothing_passes(bootable):
    done = vm(DEFAULT_KERNEL, "--test", "no_such_test", stdout=subprocess.DEVNULL)
    assert done.returncode == 4
    assert "'no_such_test'" in done.stderr


def test_a_file_that_is_no_kernel_is_not_booted():
    done = vm("/etc/passwd", "--", "true")
    assert done.returncode == 121
    assert "/etc/passwd is not a kernel" in done.stderr


def test_what_a_killed_run_has_left_is_removed(bootable, monkeypatch):
    # a socket's path has to be short
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        monkeypatch.setattr(runner, "_short_folder", lambda: name)
        for kind in ("killed", "alive"):
            folder = Path(name) / f"vdpabridge-vm-{kind}"
            folder.mkdir()
            (folder / "lock").touch()
        with (Path(name) / "vdpabridge-vm-alive/lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result, _ = boot(bootable, "true")
        assert result.exit_code == 0
        assert os.listdir(name) == ["vdpabridge-vm-alive"]


def test_hidden_files_that_were_asked_for_are_there(bootable, tmp_path):
    (tmp_path / "folder/.hidden").mkdir(parents=True)
    (tmp_path / "folder/.hidden/file").write_text("seen")
    _, output = boot(bootable, "cat /run/payload/with/folder/.hidden/file", extra=[tmp_path / "folder"])
    assert output == "seen"


def test_output_of_any_bytes(bootable):
    """What ends it is made up for each run: nothing that a command says is taken for it."""
    script = r"printf 'a\0end of output\nb\0'"
    result, output = boot(bootable, script)
    assert (result.exit_code, output) == (0, "a\0end of output\nb\0")
