"""The fuzzer: ``python3 -m tests.fuzz [libFuzzer options] [corpus]``; needs atheris. CI runs it for a bounded time.

An input that breaks something belongs into ``tests/fuzz/regressions``, which the tests play from then on.
"""

import sys

import atheris

with atheris.instrument_imports(include=["vdpabridge"]):
    from ..support.random_front_end import drive


def main():
    atheris.Setup(sys.argv, drive)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
