"""What goes wrong on the bus."""

from __future__ import annotations

from ..errors import KernelError, VdpaBridgeError
from ..holders import Holder

__all__ = ["BusError", "DeviceBusy", "DeviceHeld", "NoSuchDevice"]


class BusError(KernelError):
    """The kernel refused to change something on the bus."""


class NoSuchDevice(VdpaBridgeError):
    """No device of that name, no such node, or no vDPA at all in this kernel."""


class DeviceBusy(VdpaBridgeError):
    """Somebody uses the device, who would lose it or keep it."""

    nothing_done = True


class DeviceHeld(DeviceBusy):
    """A process has the device's node open; taking the device away would block until it lets go."""

    def __init__(self, device: str, what: str, node: str, holders: list[Holder]) -> None:
        why = f"{node} is held by {', '.join(map(str, holders))}"
        hint = "end it first; forcing this blocks, and with it every vDPA command on the machine, until it lets go"
        super().__init__(what, device=device, why=why, hint=hint)
        self.node = node
        self.holders = holders
