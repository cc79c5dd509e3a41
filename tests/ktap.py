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
        self.totals = dict.fromkeys(("pass", "fail", "skip", "error"), 0)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config):
        # pytest's own reporter stays, since others ask it for its writer, but it writes to nowhere
        terminal = config.pluginmanager.getplugin("terminalreporter")
        self._writer = terminal._tw
        terminal._tw = TerminalWriter(io.StringIO())
        self._say("KTAP version 1")

    def pytest_collection_finish(self, session):
        self._say(f"1..{len(session.items)}")

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
        name = report.nodeid.removeprefix("tests/").replace("#", "-")
        failed = [phase for phase in phases if phase.failed]
        skipped = [phase for phase in phases if phase.skipped]
        for phase in failed:
            self._diagnose(phase.longreprtext)
            for heading, text in phase.sections:
                self._diagnose(f"{heading}:\n{text}")
        duration_s = sum(phase.duration for phase in phases)
        if failed:
            self._count("fail", f"not ok {self._number} {name}")
        elif skipped:
            reason = skipped[0].longrepr[2].removeprefix("Skipped: ")
            self._count("skip", f"ok {self._number} {name} # SKIP {reason}")
        else:
            self._count("pass", f"ok {self._number} {name}" + (f" # {duration_s:.1f} s" if duration_s > 1 else ""))

    def conclude(self, status):
        """Say the totals; the exit code for pytest's ``status``."""
        totals = self.totals
        if self._writer:
            self._say(
                f"# Totals: pass:{totals['pass']} fail:{totals['fail']} xfail:0 xpass:0 "
                f"skip:{totals['skip']} error:{totals['error']}"
            )
        ended_well = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if not ended_well or totals["fail"] or totals["error"]:
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


def main(arguments):
    reporter = KtapReporter()
    return reporter.conclude(pytest.main(arguments, plugins=[reporter]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
