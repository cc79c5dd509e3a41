"""Real machines that finish, fail, hang and panic. They boot the default kernel, which is built where it is missing."""

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
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
    script = "echo out; echo err >&2; uname -r; echo $GREETING; test -e vdpabridge/device.py && id -u; exit 7"
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
