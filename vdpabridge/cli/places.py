"""The sockets of ``vdpabridge serve``: made here, handed down by whoever started us, or opened by systemd."""

from __future__ import annotations

import argparse
import contextlib
import grp
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError, VdpaBridgeError
from ..export.vhost_user.server import listen
from ..linux.systemd import passed_sockets
from ..vhost_user.connection import is_listening
from .usage import SYSTEMD

__all__ = ["listening", "place_of"]

#: What the socket for front-ends is called in a socket unit, where there is more than one.
_FRONT_END = "front-end"


@contextmanager
def place_of(arguments: argparse.Namespace) -> Iterator[tuple[socket.socket, str]]:
    """The socket to serve at, and its name. One that has a path is removed at the end."""
    if arguments.fd is None:
        with listening(arguments.socket_path, mode=arguments.socket_mode, group=arguments.socket_group) as listener:
            yield listener, arguments.socket_path
        return
    if arguments.socket_mode is not None or arguments.socket_group is not None:
        why = "--socket-mode and --socket-group are for a socket that is made here"
        raise UsageError("serve", why=why, hint="leave them out, or name a --socket-path")
    fd = _fd_of_systemd() if arguments.fd == SYSTEMD else arguments.fd
    with _given_socket(fd) as given:
        yield given, f"descriptor {fd}"


@contextmanager
def listening(path: str, *, mode: int | None = None, group: str | None = None) -> Iterator[socket.socket]:
    """A socket that listens at ``path``, whose file is removed at the end.

    With ``mode`` its file has these permissions, with ``group`` it belongs to that group: from the first moment on
    nobody else can connect.
    """
    narrow = mode is not None or group is not None
    before = os.umask(0o177) if narrow else None
    try:
        listener = listen(path)
    finally:
        if before is not None:
            os.umask(before)
    with listener:
        mine = os.stat(path).st_ino
        try:
            _open_up(path, 0o660 if mode is None and group is not None else mode, group)
            yield listener
        finally:
            # somebody may have put another one there
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == mine:
                    os.unlink(path)


def _open_up(path: str, mode: int | None, group: str | None) -> None:
    try:
        if group is not None:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        if mode is not None:
            os.chmod(path, mode)
    except KeyError:
        raise UsageError("serve", device=path, why=f"there is no group {group!r}") from None
    except OSError as error:
        why, hint = os.strerror(error.errno or 0), f"be root, or a member of group {group}" if group else ""
        raise VdpaBridgeError("listen", device=path, why=why, hint=hint) from error


def _fd_of_systemd() -> int:
    sockets = passed_sockets()
    if _FRONT_END in sockets:
        return sockets[_FRONT_END]
    if len(sockets) == 1:
        return next(iter(sockets.values()))
    why = (
        f"systemd has passed {len(sockets)} sockets, none of them called {_FRONT_END}" if sockets else "none was passed"
    )
    hint = f"a socket unit has FileDescriptorName={_FRONT_END}: see 'vdpabridge service-file socket'"
    raise UsageError("serve", device="--fd systemd", why=why, hint=hint)


def _given_socket(fd: int) -> socket.socket:
    try:
        is_listening(fd)
    except OSError as error:
        why = f"it is not a socket: {os.strerror(error.errno or 0)}"
        hint = "--fd wants an open UNIX socket"
        raise VdpaBridgeError("serve", device=f"descriptor {fd}", why=why, hint=hint) from None
    return socket.socket(fileno=fd)
