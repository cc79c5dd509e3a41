"""Makes shadow rings for a device, with the relay between them and the guest's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from ..abi.virtio_ring import VIRTIO_RING_F_EVENT_IDX
from ..abi.vring_base import QueueBase, SplitBase
from ..device import Device, DirtyLog, MemoryRegion, QueueSetup
from ..errors import VdpaBridgeError
from ..rings.descriptors import RingBroken
from ..rings.guest_view import GuestView
from ..state.losses import unsavable
from ..state.snapshot import DeviceSnapshot
from .arena import Arena
from .relay import Relay, RelayedQueue
from .ring_change import Rings
from .shadow_ring import ShadowRing

__all__ = ["NOT_SHADOWED", "Shadows", "of_the_rings"]

#: What `Shadows.make` raises.
NOT_SHADOWED = (VdpaBridgeError, OSError, ValueError, RingBroken)


class Shadows:
    """Shadow rings for ``below``, which ``user`` drives: it has the guest's side of everything. Both are borrowed."""

    def __init__(self, user: Device, below: Device) -> None:
        self._user = user
        self._below = below
        self._arena: Arena | None = None

    def make(self, snapshot: DeviceSnapshot, log: DirtyLog) -> tuple[Relay, Rings]:
        """A relay, which the caller closes, and the rings for the device; it has stopped, and ``snapshot`` is of it.

        Raises one of `NOT_SHADOWED` if that is not possible: then nothing has changed for the device.
        """
        if losses := unsavable(self._below):
            raise ValueError(f"{', '.join(loss.value for loss in losses)} would be lost by a reset")
        if any(queue.setup.address_space for queue in snapshot.queues.values()):
            raise ValueError("its queues are in more than one address space")
        with ExitStack() as undo:
            guest = GuestView()
            undo.callback(guest.close)
            guest.map(of_the_rings(self._user.regions))
            guest.set_log(log)
            arena = self._require_arena({index: queue.setup for index, queue in snapshot.queues.items()})
            queues: dict[int, RelayedQueue] = {}
            for index, queue in snapshot.queues.items():
                queues[index] = self._relayed(guest, arena, index, queue.base)
                undo.callback(queues[index].close)
            relay = Relay(self._user.name, guest, queues, self._user.limit)
            undo.pop_all()
        shadowed = {
            index: replace(queue, setup=arena.setup(index, queue.setup)) for index, queue in snapshot.queues.items()
        }
        return relay, Rings(replace(snapshot, queues=shadowed), relay.wires)

    def drop(self) -> None:
        """Take the rings' memory from the device, which must not work on it any more. Raises what `Device.unmap` does:
        then they are still there, and used again."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _relayed(self, guest: GuestView, arena: Arena, index: int, base: QueueBase) -> RelayedQueue:
        record = self._user.queues[index]
        assert record.setup is not None
        event_index = bool(self._user.accepted_features >> VIRTIO_RING_F_EVENT_IDX & 1)
        ring = ShadowRing(guest, record.setup, *arena.rings(index), event_index=event_index)
        if base != SplitBase(ring.used_index):
            raise ValueError(f"queue {index} stands at {base}, and {ring.used_index} chains are used")
        return RelayedQueue(ring, record.eventfds, enabled=record.enabled)

    def _require_arena(self, setups: Mapping[int, QueueSetup]) -> Arena:
        if self._arena is not None and not self._arena.fits(setups):
            self.drop()
        if self._arena is None:
            self._arena = Arena(self._below, setups)
        return self._arena


def of_the_rings(regions: Sequence[MemoryRegion]) -> list[MemoryRegion]:
    """Those in the address space of the rings that are relayed."""
    return [region for region in regions if region.address_space == 0]
