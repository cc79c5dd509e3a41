"""ioctl numbers from ioctl-opt, on the machines for which it gets them right.

ioctl-opt knows only the asm-generic encoding. powerpc, mips, sparc, alpha and parisc number the direction bits
differently (include/uapi/asm-generic/ioctl.h against arch/*/include/uapi/asm/ioctl.h), so every number would be wrong
there.
"""

from __future__ import annotations

import os

from ioctl_opt import IO, IOC, IOC_READ, IOC_WRITE, IOR, IOW, IOWR

__all__ = ["IO", "IOC", "IOC_READ", "IOC_WRITE", "IOR", "IOW", "IOWR", "check_machine"]

_OTHER_ENCODING = ("ppc", "powerpc", "mips", "sparc", "alpha", "parisc", "hppa")


def check_machine(machine: str) -> None:
    """Raise ImportError if ``machine`` (``uname -m``) encodes ioctl numbers in a way ioctl-opt does not know."""
    if machine.startswith(_OTHER_ENCODING):
        raise ImportError(
            f"vdpabridge: {machine}: this architecture encodes ioctl numbers in its own way, which ioctl-opt does not "
            "know; every vhost request would have a wrong number. Use another machine (x86-64, arm64, riscv64, s390x)."
        )


check_machine(os.uname().machine)
