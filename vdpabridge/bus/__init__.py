"""The kernel's vDPA bus: which devices there are (`bus`), making them (`netlink`), how they come and go (`events`)."""

from ..errors import BusError, DeviceBusy, DeviceHeld, NoSuchDevice
from .bus import Bus, BusDevice

__all__ = ["Bus", "BusDevice", "BusError", "DeviceBusy", "DeviceHeld", "NoSuchDevice"]
