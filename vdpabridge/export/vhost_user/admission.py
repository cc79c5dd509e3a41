"""Checks the descriptors that a front-end sends: each must be of a kind that its request needs, or it is refused.

A process that keeps a descriptor keeps what it refers to. A front-end could send an end of its own connection, or a
socket with that end in its queue. Then the connection would not end when the front-end does, and the device would be in
use for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence

from ...abi.vhost_user import FrontendRequest
from ...errors import VdpaBridgeError
from ...linux.descriptors import Kind, kind_of

__all__ = ["admit", "is_channel"]

_MEMORY = (Kind.FILE, Kind.DEVICE)
_KINDS = {
    FrontendRequest.SET_MEM_TABLE: _MEMORY,
    FrontendRequest.ADD_MEM_REG: _MEMORY,
    FrontendRequest.SET_LOG_BASE: (Kind.FILE,),
    FrontendRequest.SET_INFLIGHT_FD: (Kind.FILE,),
    FrontendRequest.SET_LOG_FD: (Kind.EVENTFD,),
    FrontendRequest.SET_VRING_KICK: (Kind.EVENTFD,),
    FrontendRequest.SET_VRING_CALL: (Kind.EVENTFD,),
    FrontendRequest.SET_VRING_ERR: (Kind.EVENTFD,),
    FrontendRequest.SET_BACKEND_REQ_FD: (Kind.UNIX_SOCKET,),
}


def admit(request: FrontendRequest, fds: Sequence[int]) -> None:
    """Raise `VdpaBridgeError` unless ``fds`` (borrowed) are of a kind that ``request`` can use.

    Files are sealed so that they cannot become smaller, if the front-end allows it: otherwise SIGBUS would kill a
    process that has one mapped.
    """
    for fd in fds:
        wanted = _KINDS.get(request)
        found = kind_of(fd)
        if wanted is not None and found not in wanted:
            why = f"{found.value} came with it, not {' or '.join(kind.value for kind in wanted)}"
            raise VdpaBridgeError(request.name, why=why)
        if wanted is not None and found is Kind.FILE:
            # EINVAL: it is not a memfd; EPERM: its seals are final, and QEMU's have this one already
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)


def is_channel(fd: int) -> bool:
    """Whether device state may go through ``fd`` (borrowed): it can hold only bytes, and it can be opened again, in
    another mode. For anything else the back-end makes the channel, as the protocol allows."""
    kind = kind_of(fd)
    if kind is Kind.FILE:
        return True
    return kind is Kind.PIPE and os.access(f"/proc/self/fd/{fd}", os.R_OK | os.W_OK, effective_ids=True)
