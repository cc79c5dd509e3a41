"""The running kernel's release, for expectations that differ by it. Product code never looks at it."""

import os

RELEASE = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def since(release, value, *, before):
    """``value`` on kernels from ``release`` on, ``before`` on older ones. Seen at 6.1, 6.12 and 7.2; between, by the log."""
    return value if release <= RELEASE else before
