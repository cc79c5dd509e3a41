"""The dirty log as a front-end switches it: where it is and whether it is kept come in two messages, in any order."""

from __future__ import annotations

import os

from ...device import Capability, Device, DirtyLog, RunState

__all__ = ["LogSwitch"]

_RUNNABLE = (RunState.CONFIGURED, RunState.RUNNING, RunState.SUSPENDED)


class LogSwitch:
    """Keeps the log of ``device`` (borrowed) as the front-end wants it. Owns the log's descriptor."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._log: DirtyLog | None = None
        self._wanted = False

    def set_place(self, log: DirtyLog) -> None:
        """SET_LOG_BASE; takes ``log.fd``."""
        self._drop()
        self._log = log
        self._switch()

    def set_wanted(self, wanted: bool) -> None:
        """LOG_ALL of SET_FEATURES."""
        self._wanted = wanted
        self._switch()

    def close(self) -> None:
        """End it. Idempotent; the descriptor is closed whatever the device says."""
        try:
            self.set_wanted(False)
        finally:
            self._drop()

    def _switch(self) -> None:
        if self._device.state in _RUNNABLE and Capability.DIRTY_LOG in self._device.capabilities:
            self._device.set_dirty_log(self._log if self._wanted else None)

    def _drop(self) -> None:
        if self._log is not None:
            os.close(self._log.fd)
            self._log = None
