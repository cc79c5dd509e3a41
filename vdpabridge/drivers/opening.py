"""From what people type to an open device."""

from __future__ import annotations

import os

from ..device import Device
from ..errors import VdpaBridgeError
from .registry import named

__all__ = ["device_id_of", "open_device"]


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
