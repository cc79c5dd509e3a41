"""The KTAP report of made-up tests: lines and exit codes as kernel tools expect them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PASSES = "def test_p(): pass\n"
FAILS = "def test_f():\n    print('said')\n    assert 1 == 2\n"
SKIPS = "import pytest\ndef test_s(): pytest.skip('no moon')\n"
XFAILS = "import pytest\n@pytest.mark.xfail(reason='not yet\\nnot ok 1')\ndef test_x(): assert 0\n"
XPASSES = "import pytest\n@pytest.mark.xfail(strict=False)\ndef test_x(): pass\n"
SKIPS_IN_LINES = "import pytest\ndef test_s(): pytest.skip('no moon\\nnot ok 7 fake')\n"
LEAVES = "import pytest\ndef test_l(): pytest.exit('enough')\n"
BROKEN = "import nothing_of_the_kind\n"

ROWS = [
    ({"test_a.py": PASSES}, 0, "pass:1 fail:0 xfail:0 xpass:0 skip:0 error:0"),
    ({"test_a.py": PASSES + FAILS + SKIPS}, 1, "pass:1 fail:1 xfail:0 xpass:0 skip:1 error:0"),
    ({"test_a.py": SKIPS}, 4, "pass:0 fail:0 xfail:0 xpass:0 skip:1 error:0"),
    ({"test_a.py": SKIPS + PASSES}, 0, "pass:1 fail:0 xfail:0 xpass:0 skip:1 error:0"),
    ({"test_a.py": PASSES, "test_b.py": BROKEN}, 1, "pass:0 fail:0 xfail:0 xpass:0 skip:0 error:1"),
    ({"test_a.py": PASSES + XFAILS}, 0, "pass:1 fail:0 xfail:1 xpass:0 skip:0 error:0"),
    ({"test_a.py": PASSES + XPASSES}, 0, "pass:1 fail:0 xfail:0 xpass:1 skip:0 error:0"),
    ({"test_a.py": PASSES + SKIPS_IN_LINES}, 0, "pass:1 fail:0 xfail:0 xpass:0 skip:1 error:0"),
    ({"test_a.py": PASSES + LEAVES}, 1, "pass:1 fail:0 xfail:0 xpass:0 skip:0 error:0"),
    ({}, 4, "pass:0 fail:0 xfail:0 xpass:0 skip:0 error:0"),
    ({"conftest.py": BROKEN, "test_a.py": PASSES}, 1, None),
    ({"conftest.py": "def pytest_runtest_call(): raise KeyError\n", "test_a.py": PASSES}, 1, None),
]


@pytest.mark.parametrize(("files", "code", "totals"), ROWS)
def test_reports(tmp_path, files, code, totals):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "tests.ktap", "--rootdir", tmp_path, "-c", "/dev/null", tmp_path]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    if totals is None:
        return
    lines = done.stdout.splitlines()
    assert lines[0] == "KTAP version 1"
    assert lines[-1] == f"# Totals: {totals}"
    results = [line for line in lines if re.match(r"(not )?ok \d+ ", line)]
    kinds = r"(?:pass|fail|skip):(\d+)"
    assert len(results) == sum(int(number) for number in re.findall(kinds, totals))
    assert all(line.startswith(("# ", "ok ", "not ok ", "KTAP", "1..", "Bail out!")) for line in lines)
    planned = next((int(line[3:]) for line in lines if line.startswith("1..")), 0)
    assert any(line.startswith("Bail out!") for line in lines) == (len(results) < planned)


def test_a_failure_brings_its_output(tmp_path):
    (tmp_path / "test_a.py").write_text(FAILS)
    command = [sys.executable, "-m", "tests.ktap", "--rootdir", tmp_path, "-c", "/dev/null", tmp_path]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "# E       assert 1 == 2" in done.stdout
    assert "# said" in done.stdout
    assert "\nnot ok 1 test_a.py::test_f\n" in done.stdout


def test_a_skip_says_why(tmp_path):
    (tmp_path / "test_a.py").write_text(SKIPS)
    command = [sys.executable, "-m", "tests.ktap", "--rootdir", tmp_path, "-c", "/dev/null", tmp_path]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "\nok 1 test_a.py::test_s # SKIP no moon\n" in done.stdout


def test_the_first_failure_ends_it(tmp_path):
    (tmp_path / "test_a.py").write_text(FAILS + PASSES)
    command = [sys.executable, "-m", "tests.ktap", "-x", "--rootdir", tmp_path, "-c", "/dev/null", tmp_path]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "\nBail out! 1 tests were not run\n" in done.stdout


@pytest.mark.parametrize(
    "text", ["pytest.importorskip('nothing_of_the_kind')", "pytest.skip('x', allow_module_level=True)"]
)
def test_a_module_that_skips_itself_is_a_failure_too(tmp_path, text):
    """Where skips are not allowed: tests/conftest.py."""
    shutil.copy(REPOSITORY / "tests/conftest.py", tmp_path)
    (tmp_path / "test_a.py").write_text(f"import pytest\n{text}\n{PASSES}")
    words = [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, "-c", "/dev/null", tmp_path]
    for allowed, code in (("0", pytest.ExitCode.INTERRUPTED), ("1", pytest.ExitCode.NO_TESTS_COLLECTED)):
        environment = os.environ | {"VDPABRIDGE_ALLOW_SKIPS": allowed}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout
