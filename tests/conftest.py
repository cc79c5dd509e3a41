"""Rules for every test: descriptors, children and threads are left as they were found; a skip may be made a failure."""

import os
import threading
import time

import pytest

IN_VM = os.environ.get("VDPABRIDGE_IN_VM") == "1"
#: Set by CI: a test that would be skipped fails instead.
NO_SKIPS = os.environ.get("VDPABRIDGE_NO_SKIPS") == "1"

# the tests of a real kernel run inside the test machine only, and everything else outside of it
collect_ignore = [] if IN_VM else ["vm"]


def open_descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def children():
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listing:
        return listing.read().split()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = open_descriptors()
    yield
    deadline = time.monotonic() + 2
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    after = open_descriptors()
    left = {fd: target for fd, target in after.items() if fd not in before}
    assert not left, f"descriptors left open: {left}"
    assert len(after) == len(before), f"descriptors closed that were not the test's: {before.keys() - after.keys()}"
    if os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        assert not children(), f"child processes left: {children()}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and VDPABRIDGE_NO_SKIPS is set: {report.longrepr[2]}"
