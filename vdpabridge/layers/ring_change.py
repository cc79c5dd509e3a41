"""Has a device that is suspended continue on other rings than before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..device import Capability, Device, RunState
from ..errors import VdpaBridgeError
from ..state.replay import start_over
from ..state.snapshot import DeviceSnapshot, QueueEventfds, place

__all__ = ["Rings", "change_rings", "place_rings"]

_IN_PLACE = {Capability.RESUME, Capability.SETUP_WHILE_SUSPENDED}


@dataclass(frozen=True, slots=True)
class Rings:
    """Where a device's queues are and stand, and the eventfds of each; these are borrowed."""

    snapshot: DeviceSnapshot
    wires: Mapping[int, QueueEventfds]


def change_rings(device: Device, wanted: Rings, otherwise: Rings) -> str:
    """Have ``device``, which is suspended, continue on ``wanted``, or on ``otherwise`` if it refuses those.

    Returns why it refused, if so. Without SETUP_WHILE_SUSPENDED or RESUME it is reset for that, and gets its own state
    back. If this raises, it does not work, or has failed.
    """
    if device.capabilities >= _IN_PLACE:
        go_on, at_rest = device.resume, RunState.SUSPENDED
    else:
        start_over(device, lambda: device.accept_features(wanted.snapshot.features), start=False)
        go_on, at_rest = device.start, RunState.CONFIGURED
    try:
        place_rings(device, wanted)
        go_on()
    except (VdpaBridgeError, OSError, ValueError) as error:
        if device.state is not at_rest:
            raise
        refused = str(error)
    else:
        return ""
    place_rings(device, otherwise)
    go_on()
    return refused


def place_rings(device: Device, rings: Rings) -> None:
    """Give ``device``, which does not work, these queues with their eventfds and positions."""
    for index, queue in rings.snapshot.queues.items():
        device.set_queue(index, queue.setup)
        device.set_call(index, rings.wires[index].call)
        device.set_err(index, rings.wires[index].err)
    place(device, rings.snapshot, rings.wires)
