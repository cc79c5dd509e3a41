"""Going on after a suspend, on devices that can resume and on those that cannot.

A device without RESUME (every kernel before 6.3, and most hardware) leaves the suspended state only by a reset. Set up
again with the queue positions it had, it goes on as if it had resumed; what it held besides (device state) is lost.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from ..device import Capability, Device
from .snapshot import QueueEventfds, capture, eventfds_of, restore

__all__ = ["replay", "resume"]


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

    Device state does not survive, and neither does an assignment of queue groups to address spaces.
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
        device.reset()
        restore(device, snapshot, eventfds)
        if config_call is not None:
            device.set_config_call(config_call)
        device.start()
