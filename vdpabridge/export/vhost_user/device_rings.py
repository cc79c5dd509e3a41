"""How a device is given the rings of a front-end, by what the device can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...abi.virtio import VIRTIO_F_RING_PACKED
from ...device import Capability, Device, Operation, QueueRecord, QueueSetup, RunState
from ...state.replay import start_over
from .frontend_ring import FrontendRing

__all__ = ["BINDERS", "DeviceRings"]

BINDERS = {Operation.SET_KICK: Device.set_kick, Operation.SET_CALL: Device.set_call, Operation.SET_ERR: Device.set_err}


class DeviceRings:
    """Sets up ``rings`` (index -> ring, shared with `FrontendRings`) in ``device``, which is borrowed.

    ``prepare`` is called before rings are set up in a device that is stopped.
    """

    def __init__(self, device: Device, rings: Mapping[int, FrontendRing], prepare: Callable[[], None]) -> None:
        self._device = device
        self._rings = rings
        self._prepare = prepare
        self.features: int | None = None
        """The features that the front-end has accepted; the device forgets them when it is reset."""

    # --- what the device can do ---

    @property
    def packed(self) -> bool:
        """Whether the rings are packed ones."""
        return bool((self.features or 0) >> VIRTIO_F_RING_PACKED & 1)

    @property
    def can_join(self) -> bool:
        """Whether a ring can be enabled later, while the device runs."""
        return Capability.ENABLE_WHILE_RUNNING in self._device.capabilities

    @property
    def enables_all(self) -> bool:
        """Whether all rings are enabled in the device, and only the kicks are withheld: for a device that must not be
        reset to enable a ring later."""
        return Capability.DEVICE_STATE in self._device.capabilities and not self.can_join

    def withholds(self, ring: FrontendRing) -> bool:
        """Whether ``ring``'s kick is kept from the device."""
        return not ring.enabled and not self.can_join

    # --- set up ---

    def set_up(self, setups: Mapping[int, QueueSetup]) -> Callable[[], None]:
        """Set up the stopped device. The function that is returned makes it run."""
        device = self._device
        if device.state is RunState.CONFIGURED:
            self._install_all(setups)
            return device.start
        if device.state is RunState.SUSPENDED:
            if Capability.SETUP_WHILE_SUSPENDED in device.capabilities:
                self._install_all(setups)
                return device.resume
            if Capability.RESUME in device.capabilities and self._unchanged(setups):
                for index in setups:
                    self._bind(index, self._rings[index])
                return device.resume
        # there is no other way, or an earlier replay has failed half-way
        self._replay(setups)
        return device.start

    def join(self, index: int, setup: QueueSetup) -> None:
        """Add ring ``index`` to a device that runs, and can stop one queue."""
        ring = self._rings[index]
        ring.in_device, ring.installed = True, setup
        try:
            self._install(index, ring, setup)
        except BaseException:
            # the ring may be at work all the same, or may have been
            ring.base_word = self._device.stop_queue(index).encode()
            ring.in_device = False
            raise

    def _replay(self, setups: Mapping[int, QueueSetup]) -> None:
        """Reset the device and set it up again: the only way to change what it cannot change otherwise."""
        device, features = self._device, self.features or 0

        def set_up() -> None:
            device.accept_features(features)
            self._install_all(setups)

        start_over(device, set_up, start=False, keep=False)

    def _install_all(self, setups: Mapping[int, QueueSetup]) -> None:
        self._prepare()
        for index, record in self._device.queues.items():
            if index not in setups:
                # stopped meanwhile
                self._device.enable_queue(index, False)
                for operation in list(record.eventfds):
                    BINDERS[operation](self._device, index, None)
        for index, setup in setups.items():
            self._install(index, self._rings[index], setup)

    def _install(self, index: int, ring: FrontendRing, setup: QueueSetup) -> None:
        self._device.set_queue(index, setup)
        self._device.set_base(index, ring.base(packed=self.packed))
        self._bind(index, ring)
        self._device.enable_queue(index, ring.enabled or self.enables_all)

    def _bind(self, index: int, ring: FrontendRing) -> None:
        for operation, bind in BINDERS.items():
            withheld = operation is Operation.SET_KICK and self.withholds(ring)
            bind(self._device, index, None if withheld else ring.eventfds.get(operation))

    def _unchanged(self, setups: Mapping[int, QueueSetup]) -> bool:
        """Whether the suspended device has every ring as the front-end wants it, so that it can simply resume."""
        known = {index: record for index, record in self._device.queues.items() if record.setup is not None}
        return set(known) == set(setups) and all(
            known[index].setup == setup
            and self._is_as_wanted(known[index], self._rings[index])
            and self._device.get_base(index) == self._rings[index].base(packed=self.packed)
            for index, setup in setups.items()
        )

    def _is_as_wanted(self, record: QueueRecord, ring: FrontendRing) -> bool:
        return record.enabled == ring.enabled or (record.enabled and self.withholds(ring))
