"""What systemd and a service tell each other: which sockets are open already, and that the service is ready.

Source: sd_listen_fds(3), sd_notify(3).
"""

from __future__ import annotations

import contextlib
import os
import socket

__all__ = ["notify", "passed_sockets"]

_FIRST_FD = 3


def passed_sockets() -> dict[str, int]:
    """Name -> descriptor of the sockets that systemd has opened for this process; the caller owns them.

    This removes the environment variables that name them: they are not for processes that this one starts.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not (count.isascii() and count.isdecimal()):
        return {}
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    names += [""] * (len(fds) - len(names))
    return {name or f"socket {fd}": fd for name, fd in zip(names, fds, strict=False)}


def notify(state: str) -> None:
    """Tell the service manager ``state``, for example ``READY=1``; does nothing if there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        # a path in it may be of any bytes
        sender.sendto(os.fsencode(state), address)
