"""Real machines that finish, fail, hang and panic. They boot the default kernel, which is built where it is missing."""

import io
from pathlib import Path

import pytest
from vmimages.kernel import DEFAULT_KERNEL, kernel
from vmimages.outcome import Outcome
from vmimages.runner import run

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def bootable():
    return kernel(DEFAULT_KERNEL)


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
    result, output = boot(bootable, "echo before; sleep 1000", time_limit_s=12)
    assert (result.outcome, result.exit_code) == (Outcome.TIME_LIMIT, 124)
    assert output == "before\n"
    assert "the command had begun" in result.why


def test_a_machine_that_ends_by_itself(bootable):
    result, _ = boot(bootable, "echo o > /proc/sysrq-trigger; sleep 60", time_limit_s=60)
    assert (result.outcome, result.exit_code) == (Outcome.NO_GUEST, 126)
