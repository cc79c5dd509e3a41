"""Files that are there whole, or as they were."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from vdpabridge.errors import DeadlineExceeded, VdpaBridgeError
from vdpabridge.linux.deadline import Deadline
from vdpabridge.linux.files import replacing
from vdpabridge.state.image.opening import open_image
from vdpabridge.state.transfer.channel import Limits


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
def test_one_that_was_there_is_replaced_whatever_its_mode_was(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o666)
    with open(path, "rb") as before, replacing(str(path)) as fd:
        os.write(fd, b"new")
        assert path.read_bytes() == b"old"
        assert os.fstat(fd).st_ino != os.fstat(before.fileno()).st_ino
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("what", "why"), [("link", "a symbolic link"), ("folder", "not a file"), ("fifo", "not a file"), ("", "not a file")]
)
def test_what_is_not_replaced(tmp_path, what, why):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(VdpaBridgeError, match=why), replacing(f"{tmp_path}/{what}"):
        raise AssertionError("nothing is begun")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("ways")
def test_two_at_once_for_one_path(tmp_path):
    """As two threads do, or two containers whose processes have the same number."""
    path = tmp_path / "x"
    with replacing(str(path)) as first:
        os.write(first, b"first, half")
        with replacing(str(path)) as second:
            os.write(second, b"second")
        assert path.read_bytes() == b"second"
        os.write(first, b" and whole")
    assert path.read_bytes() == b"first, half and whole"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_raised_when_the_file_was_replaced(tmp_path, monkeypatch):
    path = tmp_path / "x"
    original = os.fsync

    def failing(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "the disk")
        original(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with replacing(str(path)) as fd:
        os.write(fd, b"new")
    assert path.read_bytes() == b"new"


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
from vdpabridge.linux.files import replacing
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


@pytest.mark.usefixtures("ways")
def test_the_file_is_safe_before_it_has_its_name_and_its_name_after_that(tmp_path, monkeypatch):
    path = tmp_path / "x"
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((stat.S_IFMT(os.fstat(fd).st_mode), path.exists())))
    with replacing(str(path)) as fd:
        os.write(fd, b"new")
    assert synced == [(stat.S_IFREG, False), (stat.S_IFDIR, True)]


def test_an_error_names_the_path_and_not_what_lies_beside_it(tmp_path, monkeypatch):
    """On a file system that can only be read, the clean-up fails as well."""

    def refuse(*_words, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "unlink"):
        original = getattr(os, name)

        def only_read(path, *words, _original=original, _name=name, **options):
            if "dir_fd" in options:
                refuse()
            return _original(path, *words, **options)

        monkeypatch.setattr(os, name, only_read)
    with (
        pytest.raises(VdpaBridgeError, match=f"{tmp_path}/x: write: Read-only file system"),
        replacing(f"{tmp_path}/x"),
    ):
        pass


def test_reading_an_image(tmp_path):
    with pytest.raises(VdpaBridgeError, match="x: read: No such file"):
        open_image(str(tmp_path / "x"), Limits(Deadline(1)))
    (tmp_path / "x").write_bytes(b"image")
    fd = open_image(str(tmp_path / "x"), Limits(Deadline(1)))
    assert os.read(fd, 10) == b"image"
    os.close(fd)


def test_a_fifo_is_waited_for_as_long_as_was_said(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(DeadlineExceeded, match=r"fifo: read: no answer within 0.05 s \(nobody writes to it"):
        open_image(str(path), Limits(Deadline(0.05)))
    writer = threading.Timer(0.05, lambda: path.write_bytes(b"image"))
    writer.start()
    fd = open_image(str(path), Limits(Deadline(5)))
    writer.join()
    assert os.read(fd, 10) == b"image"
    os.close(fd)
