"""Stops a device that has no SUSPEND: wait for a moment at which it has answered everything, then reset it.

The rings say where its queues stand. That works for a device that answers every request and has no state of its own: a
disk, a source of entropy. A network card keeps the buffers that it receives into, and a reset of a file server ends the
sessions of its guest.

A VMM stops its guest before it stops its devices: then that moment comes. A guest that always has a request on its way
cannot be stopped like this. A device that polls may take a request after the last look at the rings: the reset leaves
it undone, and it is offered again when the device continues.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager

from ..abi.virtio import VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_ID_BLOCK, VIRTIO_ID_RNG
from ..abi.virtio_ring import VRING_AVAIL, VRING_USED
from ..abi.vring_base import QueueBase, SplitBase
from ..device import Capability, Device, Operation, QueueSetup, RunState
from ..errors import DeadlineExceeded, KernelError, VdpaBridgeError
from ..linux.eventfds import signal
from .layer import Layer

__all__ = ["Drained", "suspendable"]

#: Kinds of devices that answer every request, and that a reset costs nothing.
_ANSWERS_ALL = frozenset({VIRTIO_ID_BLOCK, VIRTIO_ID_RNG})
_WORD = struct.Struct("<H")
_LOOK_AGAIN_S = 0.0005
_MOD = 1 << 16


def suspendable(device: Device) -> Device:
    """``device``, which is taken and was not used yet, or a layer over it that can suspend it; the caller closes what
    is returned. A device that can neither be suspended nor drained stays as it is.
    """
    try:
        if Capability.SUSPEND in device.capabilities or not _can_be_drained(device):
            return device
        return Drained(device)
    except BaseException:
        device.close()
        raise


def _can_be_drained(device: Device) -> bool:
    """Whether a drained ``device`` can continue: some take no position but the first (vp_vdpa, eni; EOPNOTSUPP). To ask
    for that, the device is set up a little, and reset."""
    if device.identity.device_id not in _ANSWERS_ALL:
        return False
    device.accept_features(device.offered_features & 1 << VIRTIO_F_VERSION_1)
    try:
        device.set_base(0, SplitBase(1))
    except KernelError:
        return False
    finally:
        device.reset()
    return True


class Drained(Layer):
    """A device that `suspend` drains and resets. It continues by being set up again (`vdpabridge.state.replay`)."""

    def __init__(self, below: Device) -> None:
        """Take ownership of ``below``. Raises ValueError if it is not a device that answers every request."""
        if below.identity.device_id not in _ANSWERS_ALL:
            raise ValueError(f"{below.name}: a device with id {below.identity.device_id} cannot be drained")
        super().__init__(below)
        self._bases: dict[int, QueueBase] = {}
        """Where the queues stand, while it is suspended."""

    @property
    def capabilities(self) -> Set[Capability]:
        # while it is suspended, the device below is reset, and takes no rings
        return self.below.capabilities - {Capability.RESUME, Capability.SETUP_WHILE_SUSPENDED} | {Capability.SUSPEND}

    @property
    def offered_features(self) -> int:
        """Without packed rings: their positions are not one number that both sides write down."""
        return self.below.offered_features & ~(1 << VIRTIO_F_RING_PACKED)

    def _suspend(self, *, drain: bool) -> None:
        if self.state is RunState.SUSPENDED:
            return
        rings = {
            index: _Ring(self, index, record.setup)
            for index, record in sorted(self.queues.items())
            if record.setup is not None
        }
        at_work = [ring for index, ring in rings.items() if self.queues[index].enabled]
        for ring in at_work:
            # the guest may not have kicked yet
            signal(self.queues[ring.index].eventfds.get(Operation.SET_KICK))
        while True:
            self._await_answers(at_work)
            # from now on the device has no reason to look; but it may have looked since then
            with self._without_kicks(rings):
                if not any(ring.unanswered for ring in at_work):
                    with self._failing_together():
                        self.below.reset()
                    break
        self._bases = {index: SplitBase(ring.used) for index, ring in rings.items()}

    def _await_answers(self, rings: Sequence[_Ring]) -> None:
        while waiting := [ring for ring in rings if ring.unanswered]:
            if self.limit.passed:
                why = f"{waiting[0].unanswered} requests on queue {waiting[0].index} are not answered"
                hint = "the device runs on: only a reset stops it, so stop its guest first"
                timeout_s = self.limit.deadline().timeout_s or 0
                raise DeadlineExceeded("suspend", timeout_s, device=self.name, why=why, hint=hint, nothing_done=True)
            time.sleep(_LOOK_AGAIN_S)

    @contextmanager
    def _without_kicks(self, indices: Iterable[int]) -> Iterator[None]:
        """The device gets no kicks in the body, and gets what it has missed after it, unless it was reset."""
        try:
            for index in indices:
                self.below.set_kick(index, None)
            yield
        finally:
            if self.below.state is RunState.RUNNING:
                for index in indices:
                    kick = self.queues[index].eventfds.get(Operation.SET_KICK)
                    self.below.set_kick(index, kick)
                    signal(kick)

    def _get_base(self, index: int) -> QueueBase:
        if self.state is RunState.SUSPENDED:
            return self._bases.get(index, SplitBase(0))
        return super()._get_base(index)

    def _bind_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None:
        # a device that is reset takes none: it gets them when it is set up again
        if self.state is not RunState.SUSPENDED:
            super()._bind_eventfd(operation, index, eventfd)

    def _set_config_call(self, eventfd: int | None) -> None:
        if self.state is not RunState.SUSPENDED:
            super()._set_config_call(eventfd)


class _Ring:
    """What both sides have written into the ring of queue ``index``, as ``device`` sees it."""

    def __init__(self, device: Device, index: int, setup: QueueSetup) -> None:
        self.index = index
        self._available = _place(device, setup, setup.avail_address + VRING_AVAIL.offsets["idx"])
        self._used = _place(device, setup, setup.used_address + VRING_USED.offsets["idx"])

    @property
    def used(self) -> int:
        """How many requests the device has answered, modulo 2^16."""
        return _read(self._used)

    @property
    def unanswered(self) -> int:
        """How many requests the guest has made and the device has not answered."""
        # the older one first: then it is never less than it was
        used = self.used
        return (_read(self._available) - used) % _MOD


def _place(device: Device, setup: QueueSetup, address: int) -> tuple[int, int]:
    """(descriptor, offset) of the word at ``address``."""
    for region in device.regions:
        at = address - region.guest_address
        if region.address_space == setup.address_space and 0 <= at <= region.size_bytes - _WORD.size:
            return region.fd, region.offset + at
    raise VdpaBridgeError("suspend", device=device.name, why=f"its ring at {address:#x} is not in its memory")


def _read(place: tuple[int, int]) -> int:
    fd, offset = place
    value: int = _WORD.unpack(os.pread(fd, _WORD.size, offset))[0]
    return value
