"""How a command line is taken apart: what its words may be, and how it is said that they make no sense."""

from __future__ import annotations

import argparse
import math
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    # importing typing itself would slow every command down
    from typing import NoReturn

    from _typeshed import SupportsWrite

__all__ = ["SYSTEMD", "Parser", "descriptor", "mode", "passed_descriptor", "path", "seconds"]

#: In place of a descriptor's number: the one that systemd has opened.
SYSTEMD = -1
#: Some eleven days: more than poll(2) can wait (24.8 days) helps nobody.
SECONDS_MAX = 1_000_000


class Parser(argparse.ArgumentParser):
    """Its errors are JSON, if that is asked for, as all others are."""

    as_json = False

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        # argparse's own swallows errors: help that was not printed would be a success
        if message:
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the words, and end with exit code 2."""
        if self.as_json:
            import json

            print(json.dumps({"error": {"what": self.prog, "why": message}}), file=sys.stderr)
            sys.exit(2)
        super().error(message)


def seconds(word: str) -> float:
    """A length of time that a command can wait for."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of seconds above 0, and at most {SECONDS_MAX}")
    return value


def path(word: str) -> str:
    """The path of a file."""
    if not word:
        raise argparse.ArgumentTypeError("a path has at least one character")
    return word


def descriptor(word: str) -> int:
    """The number of an open file."""
    if not word.isascii() or not word.isdigit() or int(word) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"{word!r} is not the number of a descriptor")
    return int(word)


def passed_descriptor(word: str) -> int:
    """The number of an open file, or ``systemd``."""
    return SYSTEMD if word == "systemd" else descriptor(word)


def mode(word: str) -> int:
    """Permissions of a file, in octal."""
    try:
        value = int(word, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o777:
        raise argparse.ArgumentTypeError(f"{word!r} is not a mode in octal, as 660")
    return value
