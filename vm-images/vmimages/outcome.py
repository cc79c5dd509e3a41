"""How a run ended, told from the guest's own report, QEMU's end and the kernel's log."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Outcome", "Result", "judge"]


class Outcome(enum.Enum):
    """How a run ended. The value is the exit code that `Result.exit_code` gives for it."""

    FINISHED = 0
    """The command ran to its end; its own exit code counts."""
    TIME_LIMIT = 124
    """The time limit passed: the guest hangs, or the command does."""
    PANIC = 125
    """The guest's kernel panicked or oopsed."""
    COMPLAINT = 123
    """The command ended well, but the guest's kernel complained (a WARNING, a hung task ...)."""
    NO_GUEST = 126
    """The machine ended without a panic and without the command having ended."""
    NO_VERDICT = 122
    """The suite ended well without saying what it has tested, or its output could not be handed on."""


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    outcome: Outcome
    command_exit_code: int | None
    """The command's own exit code, if it ended."""
    kernel_log: str
    """The whole log of the guest's kernel."""
    why: str
    """One paragraph for a person; empty when the command ended."""
    elapsed_s: float
    output_end: bytes = b""
    """The end of the command's output."""

    @property
    def exit_code(self) -> int:
        """The command's exit code, or the outcome's own."""
        return self.outcome.value if self.command_exit_code is None else self.command_exit_code


_COMPLAINT = re.compile(
    r"^.*(WARNING: |BUG: |Oops: |general protection fault|INFO: task .* blocked|detected stall|refcount_t: |UBSAN: "
    r"|sleeping function).*$",
    re.MULTILINE,
)
_PANIC = re.compile(r"^.*(Kernel panic|BUG:|Oops:|general protection fault).*$", re.MULTILINE)


def judge(status: str, log: str, qemu_exit_code: int | None, qemu_said: str, elapsed_s: float) -> Result:
    """The result, from what came on the status port, the kernel's log, and QEMU's end (None: it still runs)."""
    finished = re.search(r"^exit (\d+)$", status, re.MULTILINE)
    if finished and (int(finished[1]) or not (complaint := _COMPLAINT.search(log))):
        return Result(Outcome.FINISHED, int(finished[1]), log, "", elapsed_s)
    if finished and complaint:
        why = "the command ended well, but the guest's kernel complained:\n" + _around(log, complaint.start())
        return Result(Outcome.COMPLAINT, None, log, why, elapsed_s)
    if panic := _PANIC.search(log):
        return Result(Outcome.PANIC, None, log, "the guest's kernel failed:\n" + _around(log, panic.start()), elapsed_s)
    begun = "the command had begun" if "started" in status else "the command had not begun"
    last_words = "the kernel's last words:\n" + _indent(log.splitlines()[-20:])
    if qemu_exit_code is None:
        why = f"no end after {elapsed_s:.0f} s ({begun}); {last_words}"
        return Result(Outcome.TIME_LIMIT, None, log, why, elapsed_s)
    said = qemu_said or "QEMU said nothing"
    why = f"the machine ended by itself, QEMU's exit code {qemu_exit_code} ({begun}): {said}; {last_words}"
    return Result(Outcome.NO_GUEST, None, log, why, elapsed_s)


def _around(log: str, position: int) -> str:
    line = log.count("\n", 0, position)
    return _indent(log.splitlines()[max(0, line - 5) : line + 40])


def _indent(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
