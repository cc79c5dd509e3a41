"""The programs on the other side: QEMU, virtiofsd, libblkio, out of the test machine's root file system."""

import shutil
import tempfile
from pathlib import Path

import pytest
from vmimages.host import HostError
from vmimages.initramfs import write_initramfs
from vmimages.kernel import DEFAULT_KERNEL, kernel
from vmimages.peers import peers as extracted_peers

from ..support.machine import lab_in


@pytest.fixture(scope="session")
def peers():
    try:
        return extracted_peers()
    except HostError as error:
        pytest.skip(f"no programs to speak to: {error}")


@pytest.fixture(scope="session")
def kernel_image():
    try:
        return kernel(DEFAULT_KERNEL).image
    except HostError as error:
        pytest.skip(f"no kernel for a guest: {error}")


@pytest.fixture(scope="session")
def initramfs(peers, tmp_path_factory):
    path = tmp_path_factory.mktemp("guest") / "initramfs"
    write_initramfs(path, peers.path("busybox"), Path(__file__).parent / "guest-init")
    return path


@pytest.fixture
def lab(peers, kernel_image, initramfs):
    # a socket's path has 107 bytes, and pytest's own directories have long names
    work = Path(tempfile.mkdtemp(prefix="vb-"))
    try:
        with lab_in(work, peers, kernel_image, initramfs) as made:
            yield made
    finally:
        shutil.rmtree(work)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed and call.when == "call" and "lab" in item.funcargs:
        report.sections.append(("what the processes have said", item.funcargs["lab"].logs()))
