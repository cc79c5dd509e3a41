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
from ..errors import VdpaBridgeError
from .names import DeviceName, DeviceNameError

__all__ = ["ENTRY_POINTS", "Driver", "named"]

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


def named(text: str) -> tuple[Driver, DeviceName]:
    """The driver of the device that ``text`` names, and its name. Raises `DeviceNameError`, and `VdpaBridgeError` for
    a driver of another package that does not load."""
    from .built_in import DRIVERS

    name = DeviceName.parse(text)
    driver = DRIVERS.get(name.kind) or _of_another_package(name)
    driver.check(name)
    return driver, name


def _of_another_package(name: DeviceName) -> Driver:
    from importlib.metadata import entry_points  # imported here: it takes longer than all else

    for entry in entry_points(group=ENTRY_POINTS, name=name.kind):
        try:
            driver = entry.load()
        except Exception as error:
            why = f"the driver {entry.value} does not load: {error}"
            raise VdpaBridgeError("open", device=name.text, why=why) from error
        if not isinstance(driver, Driver):
            raise VdpaBridgeError("open", device=name.text, why=f"{entry.value} is not a vdpabridge Driver")
        return driver
    raise DeviceNameError(name.text, f"there is no kind {name.kind!r}")
