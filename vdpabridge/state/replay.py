"""Going on after a suspend, on devices that can resume and on those that cannot.

A device without RESUME (every kernel before 6.3, and most hardware) leaves the suspended state only by a reset. Set up
again with the queue positions it had, it goes on as if it had resumed; what it held besides (device state) is lost.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from ..device import Capability, Device
from ..errors import VdpaBridgeError
from .interruptions import uninterrupted
from .snapshot import DeviceSnapshot, QueueEventfds, capture, eventfds_of, restore

__all__ = ["ReplayFailed", "replay", "resume"]


class ReplayFailed(VdpaBridgeError):
    """The device was reset and could not be set up again. ``snapshot`` has the queue positions: nothing is lost yet."""

    def __init__(self, device: str, why: str, snapshot: DeviceSnapshot) -> None:
        hint = "restore the error's snapshot on this device or another"
        super().__init__("resume by reset and replay", device=device, why=why, hint=hint)
        self.snapshot = snapshot


def resume(device: Device) -> Capability | None:
    """Go on after `Device.suspend`, by RESUME where the device has it, else by `replay`.

    Returns Capability.RESUME, or None where the device was reset and set up again.
    """
    if Capability.RESUME in device.capabilities:
        device.resume()
        return Capability.RESUME
    replay(device)
    return None


def replay(device: Device) -> None:
    """Reset a suspended device, set it up as it was, with the queue positions it had, and start it.

    Device state, the dirty log and the in-flight region do not survive. Raises `ReplayFailed` from the reset on.
    """
    snapshot = capture(device)
    with ExitStack() as stack:

        def keep(eventfd: int | None) -> int | None:
            """A duplicate: the reset closes the device's own."""
            if eventfd is None:
                return None
            duplicate = os.dup(eventfd)
            stack.callback(os.close, duplicate)
            return duplicate

        eventfds = {
            index: QueueEventfds(keep(wires.kick), keep(wires.call), keep(wires.err))
            for index, wires in eventfds_of(device).items()
        }
        config_call = keep(device.config_call)
        try:
            # cut in two it would leave a device that is reset, and positions that nobody has
            with uninterrupted():
                device.reset()
                restore(device, snapshot, eventfds)
                if config_call is not None:
                    device.set_config_call(config_call)
                device.start()
        except VdpaBridgeError as error:
            raise ReplayFailed(device.name, str(error), snapshot) from error
