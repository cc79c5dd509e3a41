"""The exit codes of every command: one table, shown by ``--help`` and by the README."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import DeadlineExceeded, MissingCapability, UsageError, VdpaBridgeError

__all__ = ["DONE", "INTERRUPTED", "NOTHING_TESTED", "REFUSED", "TABLE", "TIMED_OUT", "UNABLE", "USAGE", "exit_code"]

DONE, REFUSED, USAGE, UNABLE, NOTHING_TESTED, TIMED_OUT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

TABLE = {
    DONE: "done",
    REFUSED: "refused or failed",
    USAGE: "wrong usage",
    UNABLE: "the device cannot do it",
    NOTHING_TESTED: "nothing was tested",
    TIMED_OUT: "timed out",
    INTERRUPTED: "interrupted",
}


def exit_code(error: VdpaBridgeError) -> int:
    """The exit code that ``error`` ends a command with."""
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code
    # what the process that owns the device has said of its error
    return _REMOTE.get(getattr(error, "kind", ""), REFUSED)


_CODES: Mapping[type[VdpaBridgeError], int] = {
    MissingCapability: UNABLE,
    DeadlineExceeded: TIMED_OUT,
    UsageError: USAGE,
}
_REMOTE = {"unable": UNABLE, "timed out": TIMED_OUT}
