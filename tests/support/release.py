"""The running kernel's release, for expectations that differ by it. Product code never looks at it."""

import os

RELEASE = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def by_release(default, **older):
    """``default``, or the value for the running kernel: ``by_release(EINVAL, v6_1=0)`` is 0 on 6.1 only."""
    return older.get(f"v{RELEASE[0]}_{RELEASE[1]}", default)
