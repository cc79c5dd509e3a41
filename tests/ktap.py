"""A pytest plugin that reports in KTAP, as kernel developers' tools read it: ``pytest -p tests.ktap``.

Source: Documentation/dev-tools/ktap.rst. Exit codes are kselftest's: 0 pass, 1 fail, 4 nothing but skips.
"""

import io

import pytest
from _pytest._io import TerminalWriter

PASS, FAIL, SKIP = 0, 1, 4


class KtapReporter:
    def __init__(self, writer):
        self._writer = writer
        self._number = 0
        self._phases = {}
        self.totals = dict.fromkeys(("pass", "fail", "skip"), 0)

    def _say(self, text=""):
        self._writer.line(text, flush=True)

    def pytest_collection_finish(self, session):
        self._say("KTAP version 1")
        self._say(f"1..{len(session.items)}")

    def pytest_collectreport(self, report):
        if report.failed:
            self._diagnose(report.longreprtext)
            self.totals["fail"] += 1

    def pytest_runtest_logreport(self, report):
        phases = self._phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when != "teardown":
            return
        self._number += 1
        name = report.nodeid.removeprefix("tests/").replace("#", "-")
        failed = [phase for phase in phases if phase.failed]
        skipped = [phase for phase in phases if phase.skipped]
        for phase in failed:
            self._diagnose(phase.longreprtext)
        duration_s = sum(phase.duration for phase in phases)
        if failed:
            self.totals["fail"] += 1
            self._say(f"not ok {self._number} {name}")
        elif skipped:
            self.totals["skip"] += 1
            self._say(f"ok {self._number} {name} # SKIP {skipped[0].longrepr[2].removeprefix('Skipped: ')}")
        else:
            self.totals["pass"] += 1
            self._say(f"ok {self._number} {name}" + (f" # {duration_s:.1f} s" if duration_s > 1 else ""))

    def _diagnose(self, text):
        for line in text.splitlines():
            self._say(f"# {line}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        totals = " ".join(f"{name}:{count}" for name, count in self.totals.items())
        self._say(f"# Totals: {totals} xfail:0 xpass:0 error:0")
        if session.exitstatus not in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            ran = self.totals["pass"] or self.totals["fail"]
            session.exitstatus = FAIL if self.totals["fail"] else PASS if ran else SKIP


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    # pytest's own reporter stays, since others ask it for its writer, but it writes to nowhere
    terminal = config.pluginmanager.getplugin("terminalreporter")
    config.pluginmanager.register(KtapReporter(terminal._tw), "ktap")
    terminal._tw = TerminalWriter(io.StringIO())
