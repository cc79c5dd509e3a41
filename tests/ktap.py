"""pytest that reports in KTAP, as kernel developers' tools read it: ``python3 -m tests.ktap [pytest's arguments]``.

Source: Documentation/dev-tools/ktap.rst, tools/testing/selftests/kselftest.h. Exit codes are kselftest's: 0 passed,
1 failed (whatever went wrong), 4 nothing but skips.
"""

import io
import sys

import pytest
from _pytest._io import TerminalWriter

PASS, FAIL, SKIP = 0, 1, 4


class KtapReporter:
    def __init__(self):
        self._number = 0
        self._phases = {}
        self._writer = None
        self._planned = 0
        self.totals = dict.fromkeys(("pass", "fail", "xfail", "xpass", "skip", "error"), 0)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config):
        # pytest's own reporter stays, since others ask it for its writer, but it writes to nowhere
        terminal = config.pluginmanager.getplugin("terminalreporter")
        self._writer = terminal._tw
        terminal._tw = TerminalWriter(io.StringIO())
        self._say("KTAP version 1")

    def pytest_collection_finish(self, session):
        self._planned = len(session.items)
        self._say(f"1..{self._planned}")

    def pytest_collectreport(self, report):
        if report.failed:
            self._broken(f"{report.nodeid}: not collected", report.longreprtext)

    def pytest_internalerror(self, excrepr):
        self._broken("pytest itself failed", str(excrepr))

    def pytest_runtest_logreport(self, report):
        phases = self._phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when != "teardown":
            return
        self._number += 1
        name = one_line(report.nodeid.removeprefix("tests/").replace("#", "-"))
        failed = [phase for phase in phases if phase.failed]
        skipped = [phase for phase in phases if phase.skipped]
        for phase in failed:
            self._diagnose(phase.longreprtext)
            for heading, text in phase.sections:
                self._diagnose(f"{heading}:\n{text}")
        duration_s = sum(phase.duration for phase in phases)
        if failed:
            self._count("fail", f"not ok {self._number} {name}")
        elif skipped and hasattr(skipped[0], "wasxfail"):
            self._count("xfail", f"ok {self._number} {name} # XFAIL {one_line(skipped[0].wasxfail)}")
        elif skipped:
            reason = one_line(skipped[0].longrepr[2].removeprefix("Skipped: "))
            self._count("skip", f"ok {self._number} {name} # SKIP {reason}")
        elif any(hasattr(phase, "wasxfail") for phase in phases):
            self._count("xpass", f"ok {self._number} {name} # XPASS")
        else:
            self._count("pass", f"ok {self._number} {name}" + (f" # {duration_s:.1f} s" if duration_s > 1 else ""))

    def conclude(self, status):
        """Say the totals; the exit code for pytest's ``status``."""
        totals = self.totals
        if self._writer:
            if self._number < self._planned:
                self._say(f"Bail out! {self._planned - self._number} tests were not run")
            self._say("# Totals: " + " ".join(f"{kind}:{count}" for kind, count in totals.items()))
        ended_well = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if not ended_well or totals["fail"] or totals["error"] or self._number < self._planned:
            return FAIL
        return PASS if totals["pass"] else SKIP

    def _count(self, kind, line):
        self.totals[kind] += 1
        self._say(line)

    def _broken(self, what, text):
        self.totals["error"] += 1
        self._diagnose(f"{what}\n{text}")

    def _diagnose(self, text):
        for line in text.splitlines():
            self._say(f"# {line}")

    def _say(self, text):
        self._writer.line(text, flush=True)


def one_line(text):
    """``text`` in a line: what a reader of KTAP takes for a result must be one."""
    return " ".join(text.split())


def main(arguments):
    reporter = KtapReporter()
    return reporter.conclude(pytest.main(arguments, plugins=[reporter]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
