"""Files that are there whole, or as they were."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from vdpabridge.errors import VdpaBridgeError
from vdpabridge.state.files import replacing


@pytest.fixture(params=["nameless", "named"])
def ways(request, monkeypatch):
    """With O_TMPFILE, and on a file system that has no such thing."""
    if request.param == "named":
        original = os.open

        def without(path, flags, *words, **options):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not here")
            return original(path, flags, *words, **options)

        monkeypatch.setattr(os, "open", without)


@pytest.mark.usefixtures("ways")
def test_a_new_file(tmp_path):
    path = tmp_path / "x"
    with replacing(str(path)) as fd:
        os.write(fd, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("ways")
def test_one_that_was_there_keeps_its_mode_and_a_link_to_it_stays(tmp_path):
    path, link = tmp_path / "x", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o644)
    link.symlink_to(path)
    with replacing(str(link)) as fd:
        os.write(fd, b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), link.is_symlink()) == (b"new", True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.usefixtures("ways")
def test_nothing_is_left_of_what_failed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(str(path)) as fd:
        os.write(fd, bytes(1 // 0))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_process_that_was_killed(tmp_path, number):
    program = f"""
import os, sys
from vdpabridge.state.files import replacing
with replacing({str(tmp_path / "x")!r}) as fd:
    os.write(fd, b"half")
    print("here", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(number)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there():
    with pytest.raises(VdpaBridgeError, match="No such file"), replacing("/nowhere/x"):
        pass
