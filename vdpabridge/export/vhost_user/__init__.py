"""Any device as a vhost-user back-end, for any front-end: QEMU, Cloud Hypervisor, crosvm, libblkio, DPDK."""

from .server import Server
from .session import Session

__all__ = ["Server", "Session"]
