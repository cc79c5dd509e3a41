"""The kernel's vDPA bus: which devices there are (`bus`), making them (`netlink`), how they come and go (`events`)."""

from .bus import Bus, BusDevice
from .errors import BusError, DeviceBusy, NoSuchDevice

__all__ = ["Bus", "BusDevice", "BusError", "DeviceBusy", "NoSuchDevice"]
