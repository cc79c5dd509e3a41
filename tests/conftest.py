"""Rules for every test: descriptors, children and threads are left as they were found; a skip may be made a failure."""

import os
import signal
import threading
import time

import pytest

IN_VM = os.environ.get("VDPABRIDGE_IN_VM") == "1"
#: Unless this is set, a test that would be skipped fails: a skip is easily overlooked.
ALLOW_SKIPS = os.environ.get("VDPABRIDGE_ALLOW_SKIPS") == "1"

# the tests of a real kernel run inside the test machine only, and everything else outside of it
collect_ignore = ["peers"] if IN_VM else ["vm"]


def open_descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def children():
    """Child processes of the main thread; None where the kernel does not tell (CONFIG_PROC_CHILDREN)."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listing:
            return listing.read().split()
    except FileNotFoundError:
        assert not IN_VM, "the test kernel is configured to tell"
        return None


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = open_descriptors()
    threads = threading.active_count()
    theirs = children() or []
    yield
    deadline = time.monotonic() + 2
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    after = open_descriptors()
    left = {fd: target for fd, target in after.items() if fd not in before}
    assert not left, f"descriptors left open: {left}"
    assert len(after) == len(before), f"descriptors closed that were not the test's: {before.keys() - after.keys()}"
    assert threading.active_count() == threads, f"threads left: {threading.enumerate()}"
    left = [child for child in children() or [] if child not in theirs]
    assert not left, f"child processes left: {left}"


def pytest_configure():
    """A job in the background has SIGINT ignored, and passes that on to what it starts: Ctrl-C is tested all the same."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    forbid_skips((yield).get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """A whole module may skip itself too."""
    forbid_skips((yield).get_result())


def forbid_skips(report):
    if not ALLOW_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which takes VDPABRIDGE_ALLOW_SKIPS=1: {report.longrepr[2]}"
