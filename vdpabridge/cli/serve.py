"""``vdpabridge serve``: a device as a vhost-user back-end, by the specification's conventions for such programs.

Source: docs/interop/vhost-user.rst, "Backend program conventions": in the foreground, quick to end on SIGTERM,
``--socket-path`` or ``--fd``, ``--print-capabilities``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from contextlib import ExitStack, closing
from typing import Any, Self

from ..abi.virtio import VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET
from ..control.methods import control_server
from ..control.possession import Possession
from ..device import Device
from ..drivers.opening import device_id_of, named, open_device
from ..errors import UsageError, VdpaBridgeError
from ..export.vhost_user.server import Server
from ..layers import Drained, Layer, Logged, loggable, suspendable
from ..linux.deadline import Deadline
from ..linux.signals import harmless
from ..linux.systemd import notify
from ..state.image.opening import open_image
from ..state.losses import Loss
from ..state.procedures import load_state
from ..state.transfer.channel import Limits
from ..vhost_user.connection import Connection
from .events import Events
from .log import Log
from .places import listening, place_of
from .progress import ProgressLine

__all__ = ["serve"]

#: Virtio device id -> type in the schema vhost-user.json.
_TYPES = {VIRTIO_ID_NET: "net", VIRTIO_ID_BLOCK: "block", VIRTIO_ID_FS: "fs"}
#: Type -> what `--print-capabilities` lists; the fs one is virtiofsd's, which libvirt asks for.
_FEATURES = {"fs": ["migrate-precopy"]}
#: For a device to come to an end in; whoever sent SIGTERM may send SIGKILL soon.
_GRACE_S = 2
#: What the layers over a device mean for who uses it.
_LAYERS = (
    (
        Drained,
        "has no SUSPEND: a reset stops it, when all requests are answered. Stop its guest before you suspend, save or "
        "migrate it by command",
    ),
    (Logged, "keeps no dirty log: while its guest is migrated live, its requests pass through this process"),
)


def serve(arguments: argparse.Namespace) -> None:
    """Open the device and serve it until SIGTERM, SIGINT or, with ``--once``, the first front-end's end."""
    if arguments.print_capabilities:
        _print_capabilities(arguments.device)
        return
    if arguments.socket_path is None and arguments.fd is None:
        raise UsageError("serve", why="it was not said where", hint="--socket-path PATH or --fd N")
    named(arguments.device)
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(level=arguments.log_level)))
        ending = stack.enter_context(_Ending())
        # before the device: opening a vDPA device resets it, and that is not to happen for a mistyped path
        place, where = stack.enter_context(place_of(arguments))
        device = stack.enter_context(loggable(suspendable(open_device(arguments.device, timeout_s=arguments.timeout))))
        trace = log.trace if arguments.trace else None
        if trace is not None:
            device.trace_to(trace)
        events = Events(log)
        server = Server(device, report=log.warning, trace=trace, tell=events.tell, timeout_s=arguments.timeout)
        stack.enter_context(server)
        ending.watch(device, server)
        if arguments.restore:
            _restore(device, arguments, log)
        if arguments.control:
            control = stack.enter_context(listening(arguments.control, mode=0o600))
            possession = Possession(server, device, arguments.control)
            for which, holds, what in (
                ("moved", possession.moved, "was moved to another device"),
                ("arriving", possession.arriving, "was to get the state of another device"),
            ):
                if holds:
                    why = f"{what} ({arguments.control}.{which})"
                    log.warning(f"{device.name} {why}: held until 'load' or 'resume --force'")
            answering = control_server(
                control,
                device,
                server,
                arguments.timeout,
                report=log.warning,
                tell=events.tell,
                possession=possession,
            )
            events.control = server.also_served = stack.enter_context(answering)
        log.info(f"{device.name} is served at {where}")
        _tell_layers(device, log)
        notify(f"READY=1\nSTATUS={device.name} is served at {where}")
        if named(arguments.device)[1].kind in ("vhost-vdpa", "vdpa"):
            log.info(
                "hardware pins the guest's memory: switch ballooning, free page reporting and virtio-mem off in the VMM"
            )
        if place.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            server.serve(place, once=arguments.once)
        else:
            server.serve_connection(Connection(place, "the front-end", timeout_s=arguments.timeout))


def _tell_layers(device: Device, log: Log) -> None:
    for kind, what in _LAYERS:
        if isinstance(device, Layer) and kind in device:
            log.info(f"{device.name} {what}")


def _print_capabilities(device: str) -> None:
    kind = _TYPES.get(device_id_of(device) or 0)
    if kind is None:
        why, hint = "its kind is not known", "say it: vhost-user:SOCKET,id=fs"
        raise VdpaBridgeError("print capabilities", device=device, why=why, hint=hint)
    print(json.dumps({"type": kind, "features": _FEATURES.get(kind, [])}))


def _restore(device: Device, arguments: argparse.Namespace, log: Log) -> None:
    """Begin with the state in an image."""
    fd = open_image(arguments.restore, Limits(Deadline(arguments.timeout)))
    accept = frozenset(map(Loss, arguments.accept))
    try:
        with ProgressLine("restore") as progress:
            report = load_state(device, fd, Limits(Deadline(arguments.timeout), progress=progress), accept=accept)
    except VdpaBridgeError as error:
        error.device = f"{arguments.restore} into {error.device or device.name}"
        raise
    finally:
        os.close(fd)
    log.info(f"{device.name} has its state from {arguments.restore}: {report.state_bytes} bytes")


class _Ending:
    """SIGTERM and SIGINT end the server, with success; within seconds also where the device keeps it waiting."""

    def __init__(self) -> None:
        self._watched: tuple[Device, Server] | None = None
        self._before: dict[int, Any] = {}
        self._ended = False
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def watch(self, device: Device, server: Server) -> None:
        """From now on there is something to end well."""
        server.signal_fd = self._woken
        self._watched = device, server
        if self._ended:
            # one that came while a module was imported may have been swallowed there
            raise SystemExit(0)

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number, handler in ((signal.SIGTERM, self._end), (signal.SIGINT, self._end), (signal.SIGALRM, self._hurry)):
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._woken)
        os.close(self._wake)

    @harmless
    def _end(self, *_: object) -> None:
        self._ended = True
        if self._watched is None:
            raise SystemExit(0)
        device, server = self._watched
        # for all waits that are still to come; the one that lasts already is what the alarm is for
        signal.alarm(_GRACE_S)
        device.timeout_s = _GRACE_S
        server.stop()
        notify("STOPPING=1")

    def _hurry(self, *_: object) -> None:
        signal.alarm(_GRACE_S)
        raise SystemExit(0)
