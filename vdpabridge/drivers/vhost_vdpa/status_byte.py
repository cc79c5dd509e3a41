"""The status byte of a device: all that the kernel tells of what the device makes of a request."""

from __future__ import annotations

import time
from collections.abc import Callable

from ...abi.vhost import VhostIoctl as Ioctl
from ...abi.virtio import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    status_names,
)
from ...errors import DeadlineExceeded, DeviceFailed
from ...linux.deadline import Deadline
from .kernel_requests import KernelRequests

__all__ = ["LIVE", "NEGOTIATED", "READY", "StatusByte"]

READY = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER
NEGOTIATED = READY | VIRTIO_CONFIG_S_FEATURES_OK
LIVE = NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK
_BROKEN = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED
#: What a bus answers for a device that was pulled out (vp_vdpa).
_GONE = 0xFF
#: For a reset if the device has no deadline: the kernel's own drivers wait for ever, and so would this one.
_RESET_S = 30.0


class StatusByte:
    """The status byte behind ``ask`` (borrowed). ``fail`` marks the device as failed; what it returns is raised."""

    def __init__(self, ask: KernelRequests, fail: Callable[[str], DeviceFailed]) -> None:
        self._ask = ask
        self._fail = fail

    def read(self) -> int:
        """The byte as it is now."""
        return self._ask.get(Ioctl.VHOST_VDPA_GET_STATUS)

    def request(self, status: int) -> None:
        """Write it. This succeeds also if the device does not take it."""
        self._ask.set(Ioctl.VHOST_VDPA_SET_STATUS, status)

    def write(self, status: int) -> None:
        """Write it, and check that the device took it."""
        self.request(status)
        seen = self.read()
        if seen & _BROKEN or seen & status != status:
            raise self._fail(f"status is {status_names(seen)} after writing {status_names(status)}")

    def require_negotiated(self) -> None:
        """Raise if the device has not exactly accepted its features: for example after a reset that did not complete,
        and then the device would start without features."""
        if (status := self.read()) != NEGOTIATED:
            raise self._fail(f"status is {status_names(status)}, but features were accepted")

    def require_live(self) -> None:
        """Raise without DRIVER_OK: then SUSPEND and RESUME answer 0 and do nothing. A device that gave up has lost
        it."""
        status = self.read()
        if status & (VIRTIO_CONFIG_S_DRIVER_OK | _BROKEN) != VIRTIO_CONFIG_S_DRIVER_OK:
            raise self._fail(f"status is {status_names(status)}, but the device was started")

    def require_in_order(self) -> None:
        """Raise if the device asks for a reset, or has failed."""
        if (status := self.read()) & _BROKEN:
            raise self._fail(f"status is {status_names(status)}")

    @property
    def is_idle(self) -> bool:
        """Whether it does nothing. A suspended device has DRIVER_OK too, and nothing tells it from one that runs."""
        return not self.read() & VIRTIO_CONFIG_S_DRIVER_OK

    def await_reset(self, deadline: Deadline, *, device: str, stuck: Callable[[], bool]) -> None:
        """Wait until it is 0. Ask again if an answer is late, unless the request is ``stuck`` in the kernel."""
        if deadline.timeout_s is None:
            deadline = Deadline(_RESET_S)
        status = self.read()
        while status != 0:
            if status == _GONE:
                raise self._fail("its status reads as 0xff: it is not there any more")
            time.sleep(0.001)
            try:
                status = self.read()
            except DeadlineExceeded:
                if stuck():
                    raise
            if deadline.passed:
                why = f"status is still {status_names(status)}"
                raise DeadlineExceeded("reset", deadline.timeout_s or 0, device=device, why=why)
