"""The dirty log and the in-flight region as a front-end wants them, also after resets of the device."""

from __future__ import annotations

import os
from dataclasses import replace

from ...device import Capability, Device, DirtyLog, InflightRegion, RunState

__all__ = ["InflightSwitch", "LogSwitch"]

_RUNNABLE = (RunState.CONFIGURED, RunState.RUNNING, RunState.SUSPENDED)


class LogSwitch:
    """Keeps the log of ``device`` (borrowed) as the front-end wants it. Owns the log's descriptor.

    The front-end says in two messages, in any order, where the log is and whether to keep it.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._log: DirtyLog | None = None
        self._wanted = False

    def set_place(self, log: DirtyLog) -> None:
        """SET_LOG_BASE; takes ownership of ``log.fd``."""
        self._drop()
        self._log = log
        self._switch()

    def set_wanted(self, wanted: bool) -> None:
        """LOG_ALL of SET_FEATURES."""
        self._wanted = wanted
        self._switch()

    def apply(self) -> None:
        """Make the device keep the log, if the front-end wants it."""
        if self._wanted and self._log is not None and self._device.dirty_log is None:
            self._switch()

    def close(self) -> None:
        """End the log. Idempotent; closes the descriptor also if the device raises."""
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


class InflightSwitch:
    """Keeps the in-flight region of ``device`` (borrowed) as the front-end wants it. Owns a descriptor of it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._region: InflightRegion | None = None

    def set_region(self, region: InflightRegion) -> None:
        """SET_INFLIGHT_FD; ``region.fd`` is borrowed."""
        own = replace(region, fd=os.dup(region.fd))
        try:
            self._device.set_inflight(own)
        except BaseException:
            os.close(own.fd)
            raise
        self.forget()
        self._region = own

    def apply(self) -> None:
        """Make the device use the region."""
        if self._region is not None and self._device.inflight is None and self._device.state is not RunState.RUNNING:
            self._device.set_inflight(self._region)

    def forget(self) -> None:
        """The front-end has reset the device."""
        region, self._region = self._region, None
        if region is not None:
            os.close(region.fd)

    def close(self) -> None:
        """Take the region from the device. Idempotent."""
        was_set = self._region is not None
        self.forget()
        if was_set and self._device.inflight is not None:
            self._device.set_inflight(None)
