"""What the control socket of ``vdpabridge serve`` can be asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from ..abi.features import feature_names
from ..deadline import Deadline
from ..device import Device, RunState
from ..errors import VdpaBridgeError
from ..export.vhost_user.server import Server
from ..state.channel import Limits
from ..state.procedures import load_state, save
from ..state.report import Report
from .server import Method

__all__ = ["methods_of"]


class _Controlled:
    def __init__(self, device: Device, server: Server, timeout_s: float | None) -> None:
        self._device = device
        self._server = server
        self._timeout_s = timeout_s
        self._held = False
        self._last: Report | None = None

    def status(self, _params: Mapping[str, Any], _descriptor: Callable[[], int]) -> dict[str, Any]:
        """What the device is, and what it does."""
        device = self._device
        stopped = device.state in (RunState.CONFIGURED, RunState.SUSPENDED)
        queues = {
            str(index): {
                "size": record.setup.size,
                "enabled": record.enabled,
                **({"position": device.get_base(index).encode()} if stopped else {}),
            }
            for index, record in sorted(device.queues.items())
            if record.setup is not None
        }
        return {
            "device": device.name,
            "device_id": device.identity.device_id,
            "state": device.state.value,
            "held": self._held,
            "front_end": self._server.session is not None,
            "capabilities": sorted(each.value for each in device.capabilities),
            "features": feature_names(device.accepted_features, device.identity.device_id),
            "queues": queues,
            "last_procedure": None if self._last is None else _shown(self._last),
        }

    def suspend(self, _params: Mapping[str, Any], _descriptor: Callable[[], int]) -> dict[str, Any]:
        """Suspend, until `resume`; the front-end's requests do not start the device meanwhile."""
        if self._server.session is not None:
            self._server.session.hold()
        elif self._device.state is RunState.RUNNING:
            self._device.suspend()
        self._held = True
        return {"state": self._device.state.value}

    def resume(self, _params: Mapping[str, Any], _descriptor: Callable[[], int]) -> dict[str, Any]:
        """Let the device do again what its front-end wants."""
        self._held = False
        if self._server.session is not None:
            self._server.session.release()
        return {"state": self._device.state.value}

    def save(self, params: Mapping[str, Any], descriptor: Callable[[], int]) -> dict[str, Any]:
        """Write an image to the descriptor. ``stay``: the device stays suspended afterwards."""
        fd = descriptor()
        was_held = self._held
        report = Report()
        try:
            with report.step("suspend"):
                self.suspend({}, descriptor)
            try:
                saved = save(self._device, fd, self._limits(params), go_on=False)
            except BaseException:
                self._go_on(was_held)
                raise
        finally:
            os.close(fd)
        saved.steps[:0] = report.steps
        self._last = report = saved
        if not params.get("stay"):
            self._go_on(was_held)
        return {**_shown(report), "state": self._device.state.value}

    def load(self, params: Mapping[str, Any], descriptor: Callable[[], int]) -> dict[str, Any]:
        """Give the device the state in the image that the descriptor has; its queues are its front-end's to set up."""
        fd = descriptor()
        try:
            self._last = load_state(self._device, fd, self._limits(params))
        finally:
            os.close(fd)
        return {**_shown(self._last), "device": self._device.name}

    def _go_on(self, was_held: bool) -> None:
        if not was_held:
            self.resume({}, lambda: -1)

    def _limits(self, params: Mapping[str, Any]) -> Limits:
        most = params.get("limit_bytes")
        if most is not None and not isinstance(most, int):
            raise VdpaBridgeError("save", why=f"limit_bytes {most!r} is no number")
        return Limits(Deadline(self._timeout_s), size_bytes=most)


def methods_of(device: Device, server: Server, timeout_s: float | None) -> dict[str, Method]:
    """The methods, by name. ``timeout_s`` bounds each transfer, during which the front-end waits."""
    controlled = _Controlled(device, server, timeout_s)
    return {
        "status": controlled.status,
        "suspend": controlled.suspend,
        "resume": controlled.resume,
        "save": controlled.save,
        "load": controlled.load,
    }


def _shown(report: Report) -> dict[str, Any]:
    steps = [dataclasses.asdict(step) for step in report.steps]
    return {"state_bytes": report.state_bytes, "digest": report.digest.hex(), "steps": steps}
