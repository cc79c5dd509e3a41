"""The simulated file server, mounted by the kernel's own virtiofs."""

import os
import subprocess

import pytest

from vdpabridge.bus import Bus

from .conftest import TAG


@pytest.fixture
def mounted(nodes, tmp_path):
    """The folder where the first file server is mounted."""
    bus = Bus()
    bus.bind("fs0", "virtio_vdpa")
    subprocess.run(["mount", "-t", "virtiofs", TAG, tmp_path], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)
        bus.bind("fs0", "vhost_vdpa")


def test_the_files(mounted):
    assert sorted(os.listdir(mounted)) == ["README", "lines", "many"]
    assert sorted(os.listdir(mounted / "many")) == [f"{number:05}" for number in range(10)]
    assert (mounted / "README").read_text() == "These files exist in the memory of a simulated device only.\n"
    assert (mounted / "many/00007").read_text() == "this is file 7\n"
    lines = (mounted / "lines").read_text().splitlines()
    assert lines == [f"line {number:05} of the file called lines" for number in range(2000)]


def test_nothing_can_be_changed(mounted):
    with pytest.raises(OSError, match="Read-only file system"):
        (mounted / "new").write_text("x")
    with pytest.raises(OSError, match="Read-only file system"):
        (mounted / "README").write_text("x")
