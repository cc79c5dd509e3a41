"""From what people type to an open device."""

from __future__ import annotations

import os

from ..device import Device
from ..errors import VdpaBridgeError
from .built_in import DRIVERS
from .names import DeviceName, DeviceNameError
from .registry import ENTRY_POINTS, Driver

__all__ = ["device_id_of", "named", "open_device"]


def open_device(text: str, *, timeout_s: float | None = None) -> Device:
    """The device that ``text`` names, opened; the caller closes it. Raises `VdpaBridgeError`."""
    driver, name = named(text)
    try:
        return driver.open(name, timeout_s)
    except VdpaBridgeError:
        raise
    except OSError as error:
        raise VdpaBridgeError("open", device=text, why=os.strerror(error.errno or 0)) from error
    except ValueError as error:
        raise VdpaBridgeError("open", device=text, why=str(error)) from error


def device_id_of(text: str) -> int | None:
    """The virtio device id of what ``text`` names, without opening it; None if that cannot be known."""
    driver, name = named(text)
    return driver.device_id(name)


def named(text: str) -> tuple[Driver, DeviceName]:
    """The driver of the device that ``text`` names, and its name. Raises `DeviceNameError`, and `VdpaBridgeError` for
    a driver of another package that does not load."""
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
