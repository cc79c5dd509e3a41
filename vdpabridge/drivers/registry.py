"""Which kinds of device there are: the built-in ones, and those of other packages, by entry point.

Another package registers a driver in its ``pyproject.toml``::

    [project.entry-points."vdpabridge.drivers"]
    mykind = "mypackage.driver:DRIVER"

where ``DRIVER`` is a `Driver`. Its devices are named ``mykind:TARGET,option=value``, and work wherever the built-in
ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..device import Device
from .names import DeviceName

__all__ = ["ENTRY_POINTS", "Driver"]

ENTRY_POINTS = "vdpabridge.drivers"


@dataclass(frozen=True, slots=True)
class Driver:
    """How devices of one kind are named and opened."""

    check: Callable[[DeviceName], None]
    """Raises `DeviceNameError` for a name that none of its devices has; opens nothing."""
    open: Callable[[DeviceName, float | None], Device]
    """Opens the named device, with a timeout in seconds; the caller closes it."""
    device_id: Callable[[DeviceName], int | None]
    """The virtio device id, without opening the device; None if that cannot be known."""
