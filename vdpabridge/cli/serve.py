"""``vdpabridge serve``: a device as a vhost-user back-end, by the specification's conventions for such programs.

Source: docs/interop/vhost-user.rst, "Backend program conventions": in the foreground, quick to end on SIGTERM,
``--socket-path`` or ``--fd``, ``--print-capabilities``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..abi.virtio import VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET
from ..errors import VdpaBridgeError
from ..export.vhost_user.server import Server, listen
from ..opening import DeviceName, device_id_of, open_device
from ..vhost_user.connection import Connection, is_listening

__all__ = ["serve"]

#: Virtio device id -> type in the schema vhost-user.json.
_TYPES = {VIRTIO_ID_NET: "net", VIRTIO_ID_BLOCK: "block", VIRTIO_ID_FS: "fs"}
#: Type -> what `--print-capabilities` lists; the fs one is virtiofsd's, which libvirt asks for.
_FEATURES = {"fs": ["migrate-precopy"]}


def serve(words: argparse.Namespace) -> None:
    """Open the device and serve it until SIGTERM, SIGINT or, with ``--once``, the first front-end's end."""
    if words.print_capabilities:
        _print_capabilities(words.device)
        return
    if words.socket_path is None and words.fd is None:
        raise VdpaBridgeError("serve", why="it was not said where", hint="--socket-path PATH or --fd N")
    DeviceName.parse(words.device)
    # before the device: opening a vDPA device resets it, and that is not to happen for a mistyped path
    with _socket(words) as (place, where), open_device(words.device, timeout_s=words.timeout) as device:
        trace = _say if words.trace else None
        with Server(device, report=_say, trace=trace, timeout_s=words.timeout) as server, _signals(server):
            _say(f"{device.name} is served at {where}")
            if place.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                server.serve(place, once=words.once)
            else:
                server.serve_connection(Connection(place, "the front-end", timeout_s=words.timeout))


def _print_capabilities(device: str) -> None:
    kind = _TYPES.get(device_id_of(device) or 0)
    if kind is None:
        why, hint = "its kind is not known", "say it: vhost-user:SOCKET,id=fs"
        raise VdpaBridgeError("print capabilities", device=device, why=why, hint=hint)
    print(json.dumps({"type": kind, "features": _FEATURES.get(kind, [])}))


@contextmanager
def _socket(words: argparse.Namespace) -> Iterator[tuple[socket.socket, str]]:
    """The socket to serve at, and its name. A path is removed at the end."""
    if words.fd is not None:
        with _given_socket(words.fd) as given:
            yield given, f"descriptor {words.fd}"
        return
    with listen(words.socket_path) as listener:
        mine = os.stat(words.socket_path).st_ino
        try:
            yield listener, words.socket_path
        finally:
            # somebody may have put another one there
            with contextlib.suppress(FileNotFoundError):
                if os.stat(words.socket_path).st_ino == mine:
                    os.unlink(words.socket_path)


def _given_socket(fd: int) -> socket.socket:
    try:
        is_listening(fd)
    except OSError as error:
        why = f"it is no socket: {os.strerror(error.errno or 0)}"
        raise VdpaBridgeError(
            "serve", device=f"descriptor {fd}", why=why, hint="--fd wants an open UNIX socket"
        ) from None
    return socket.socket(fileno=fd)


@contextmanager
def _signals(server: Server) -> Iterator[None]:
    """SIGTERM ends the server as it ends the process otherwise: at once, and with success. SIGINT too."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, lambda *_: server.stop())
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"vdpabridge: {text}", file=sys.stderr, flush=True)
