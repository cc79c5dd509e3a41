"""The kernel's vDPA bus: which devices there are, which driver has them, how they come and go."""

from .bus import Bus, BusDevice
from .errors import BusError, DeviceBusy
from .events import BusEvent, BusEvents

__all__ = ["Bus", "BusDevice", "BusError", "BusEvent", "BusEvents", "DeviceBusy"]
