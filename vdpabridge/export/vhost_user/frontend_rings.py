"""The rings as a front-end wants them, and the policy that brings the device there.

A front-end controls rings one by one; a device starts, suspends and resumes as a whole. SET_VRING_KICK starts a ring,
and GET_VRING_BASE stops it. The device runs when a started ring is also enabled, and is suspended when the last ring is
stopped. Source: docs/interop/vhost-user.rst, "Ring states".

If a device cannot disable a queue while it runs, it does not get the kicks of a disabled ring: then it has no reason to
look into the ring. To suspend the device for every ring would be slow, and a device that cannot resume would be reset,
in the middle of an ordinary stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from ...abi.vhost_user_payloads import Region, VringAddr
from ...device import Capability, Device, Operation, RunState
from ...errors import VdpaBridgeError
from ...linux.eventfds import signal
from .device_rings import BINDERS, DeviceRings
from .frontend_memory import FrontendMemory
from .frontend_ring import FrontendRing

__all__ = ["FrontendRings"]


def _nothing() -> None:
    return


class FrontendRings:
    """The rings of ``device``, with ``memory`` to find them in; both are borrowed. Owns the front-end's eventfds."""

    def __init__(self, device: Device, memory: FrontendMemory, prepare: Callable[[], None] = _nothing) -> None:
        """``prepare`` is called before rings are set up in a device that is stopped."""
        self._device = device
        self._memory = memory
        self._rings: dict[int, FrontendRing] = {}
        self._installer = DeviceRings(device, self._rings, prepare)
        self._held = False
        self._due = False
        """Whether it is held only because resuming it failed."""
        self._ending = False
        """Whether the device was suspended because one ring was stopped. The others are stopped next."""
        self._waiting = False

    @property
    def features(self) -> int | None:
        """The features that the front-end has accepted; the device forgets them when it is reset."""
        return self._installer.features

    @features.setter
    def features(self, features: int | None) -> None:
        self._installer.features = features

    # --- what the front-end says ---

    def set_size(self, index: int, size: int) -> None:
        """SET_VRING_NUM."""
        if size == 0 or size > self._device.identity.queue_size_max:
            most = self._device.identity.queue_size_max
            # no message says so before. The QEMU 10.0.13 of Debian has 1024, whatever its queue-size= says (seen)
            hint = f"have the VMM offer its guest no more (queue-size={most})"
            raise VdpaBridgeError(f"queue {index}", why=f"{size} descriptors; at most {most}", hint=hint)
        self._stopped(index).size = size

    def set_address(self, index: int, address: VringAddr) -> None:
        """SET_VRING_ADDR. For a ring at work only the logging may change, and the device logs in any case."""
        ring = self._settled(index)
        if ring.in_device and ring.setup(self._memory, address) != ring.installed:
            raise VdpaBridgeError(f"queue {index}", why="it is at work and cannot be moved")
        ring.address = address
        if ring.started and not ring.in_device:
            # it paused because its memory was gone
            self.go_on()

    def set_base(self, index: int, word: int) -> None:
        """SET_VRING_BASE."""
        self._stopped(index).base_word = word

    def set_eventfd(self, operation: Operation, index: int, fd: int | None) -> None:
        """SET_VRING_KICK, CALL or ERR. Takes ownership of ``fd``. A kick descriptor starts the ring."""
        starts = operation is Operation.SET_KICK and fd is not None
        try:
            ring = self._settled(index)
            if starts and ring.described and not ring.started:
                # a ring that is not in memory is not started: the others would wait for it
                ring.setup(self._memory)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        ring.keep(operation, fd)
        if ring.in_device:
            if operation is not Operation.SET_KICK or not self._installer.withholds(ring):
                BINDERS[operation](self._device, index, fd)
        elif starts:
            ring.started = True
            self._ending = False
            self._advance()

    def enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE."""
        ring = self._settled(index)
        ring.enabled, ring.enable_known = enabled, True
        if enabled:
            self._ending = False
        if ring.in_device:
            self._enable_live(index, enabled)
        else:
            self._advance()

    def enable_all(self) -> None:
        """What SET_FEATURES without PROTOCOL_FEATURES means."""
        for index in range(self._device.identity.queue_count):
            ring = self._ring(index)
            if ring.in_device and not ring.enabled:
                self.enable(index, True)
            ring.enabled = ring.enable_known = True
        self._advance()

    def stop(self, index: int, *, drain: bool) -> int:
        """GET_VRING_BASE: stop the ring and return the word for its position."""
        ring = self._settled(index)
        device = self._device
        if ring.in_device:
            if Capability.QUEUE_CONTROL in device.capabilities:
                ring.base_word = device.stop_queue(index, drain=drain).encode()
                ring.in_device = False
                if not any(each.in_device for each in self._rings.values()):
                    device.suspend(drain=drain)
            else:
                # the device stops as a whole; the front-end asks for the others' positions next
                device.suspend(drain=drain)
                self._collect_bases()
                self._ending = True
        ring.started = False
        if not ring.enabled:
            ring.enable_known = False
        ring.keep(Operation.SET_KICK, None)
        # the others may have waited for this one
        self.go_on()
        if self.features is None and ring.base_word is not None:
            # without features the meaning of the word is not known yet
            return ring.base_word
        return ring.base(packed=self._installer.packed).encode()

    def suspend(self) -> None:
        """Stop everything that is at work: for a front-end that has left, or until `go_on`."""
        if self._device.state is RunState.RUNNING:
            self._device.suspend()
            self.settle()

    def settle(self) -> None:
        """Ask for the rings' positions, if the device is stopped and could not be asked when it stopped."""
        if self._device.state in (RunState.CONFIGURED, RunState.SUSPENDED):
            self._collect_bases()

    def _settled(self, index: int) -> FrontendRing:
        ring = self._ring(index)
        if ring.in_device:
            self.settle()
        return ring

    def lie_in(self, regions: Iterable[Region]) -> bool:
        """Whether a part of a ring that is at work is in one of ``regions``."""
        parts = [
            part
            for ring in self._rings.values()
            if ring.in_device and ring.installed is not None
            for part in ring.installed.parts(packed=self._installer.packed)
        ]
        return any(
            begin < region.guest_address + region.size_bytes and region.guest_address < begin + size_bytes
            for region in regions
            for begin, size_bytes in parts
        )

    @property
    def lost(self) -> bool:
        """Whether the device has failed and cannot continue for this front-end: the positions of its rings are not
        known (an earlier position would do requests twice), or it had state of its own."""
        if self._device.state is not RunState.FAILED:
            return False
        return Capability.DEVICE_STATE in self._device.capabilities or any(
            ring.in_device for ring in self._rings.values()
        )

    @property
    def held(self) -> bool:
        """Whether the device is to stay suspended, whatever the front-end does."""
        return self._held

    def hold(self) -> None:
        """Suspend, and stay suspended whatever the front-end does, until `release`; also if this raises."""
        self._held, self._due = True, False
        self.suspend()

    def release(self) -> None:
        """End `hold`: do what the front-end wants by now. If this raises, the hold lasts, unless `lost`. Idempotent."""
        if not self._held:
            return
        self._due = True
        # a suspend that failed late may have stopped some or all queues without saying so: it is completed first
        self.suspend()
        self._held = False
        try:
            self.go_on()
        except BaseException:
            # a lost device cannot run in any case
            self._held = self._due = not self.lost
            raise
        self._due = False

    def go_on(self) -> None:
        """Continue after `suspend`, if the place of every ring that was started is known. Whether that is in memory
        `_advance` looks."""
        if all(ring.described for ring in self._rings.values() if ring.started):
            self._advance()

    @property
    def waiting(self) -> bool:
        """Whether enabled rings wait for the front-end to say whether others are enabled. Some front-ends say so for
        each ring and others only for some, and this one may be either."""
        return self._waiting

    def wait_no_longer(self) -> None:
        """Stop waiting for the front-end: a ring that it has not enabled by now is disabled."""
        for ring in self._rings.values():
            ring.enable_known = True
        self.go_on()

    def leave_device(self) -> None:
        """This process has reset the device: it has no rings any more. What the front-end has said of them stands."""
        for ring in self._rings.values():
            ring.in_device, ring.installed = False, None

    def forget(self) -> None:
        """RESET_DEVICE was done: every ring is stopped and disabled, and at its beginning."""
        if self._due:
            self._held = self._due = False
        self.features = None
        self._ending = self._waiting = False
        for ring in self._rings.values():
            ring.forget()

    def close(self) -> None:
        """Close the eventfds. Idempotent."""
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()

    # --- what the device is told ---

    def _advance(self) -> None:
        """Start or resume the device, if the front-end has said everything that must be waited for."""
        device = self._device
        self._waiting = False
        started = [ring for ring in self._rings.values() if ring.started]
        if self._held or self._ending or not any(ring.enabled for ring in started) or self._waits_for_memory():
            return
        if device.state is RunState.RUNNING:
            # the device did not wait for these rings before, so it does not wait for them after a pause
            for ring in started:
                ring.enable_known = True
            if any(ring.enabled and not ring.in_device for ring in started):
                self._join()
        elif self._installer.can_join or self._installer.enables_all or all(ring.enable_known for ring in started):
            if self.features is None:
                raise VdpaBridgeError("start", device=device.name, why="SET_FEATURES did not come before the rings")
            self._go()
        else:
            self._waiting = True

    def _waits_for_memory(self) -> bool:
        """Whether a started ring is not in memory: a front-end that removes memory adds other memory next."""
        try:
            for ring in self._rings.values():
                if ring.started and ring.described:
                    ring.setup(self._memory)
        except VdpaBridgeError:
            return True
        return False

    def _go(self) -> None:
        device = self._device
        if self.lost:
            device.check_health()
        # check all of them before anything is touched
        setups = {index: ring.setup(self._memory) for index, ring in self._rings.items() if ring.started}
        self.settle()
        go = self._installer.set_up(setups)
        # before the device is told: if that raises, the rings may be at work all the same
        for index, setup in setups.items():
            self._rings[index].in_device, self._rings[index].installed = True, setup
        try:
            go()
        except BaseException:
            # in any state but RUNNING and FAILED it is certain that nothing is at work; some rings may have been
            self.settle()
            raise

    def _join(self) -> None:
        """Add the rings that were started after the device."""
        setups = {index: ring.setup(self._memory) for index, ring in self._rings.items() if ring.started}
        if {Capability.QUEUE_CONTROL, Capability.ENABLE_WHILE_RUNNING} <= self._device.capabilities:
            for index, setup in setups.items():
                if self._rings[index].enabled and not self._rings[index].in_device:
                    self._installer.join(index, setup)
        else:
            self.suspend()
            self._go()

    def _enable_live(self, index: int, enabled: bool) -> None:
        device = self._device
        if Capability.ENABLE_WHILE_RUNNING in device.capabilities:
            device.enable_queue(index, enabled)
        elif not any(ring.in_device and ring.enabled for ring in self._rings.values()):
            # no ring is enabled: this is a pause, or a stop follows
            self.suspend()
        elif enabled and not device.queues[index].enabled:
            self.suspend()
            self._advance()
        else:
            kick = self._rings[index].eventfds.get(Operation.SET_KICK) if enabled else None
            device.set_kick(index, kick)
            # the previous reader of the eventfd may have read a kick from it
            signal(kick)

    def _collect_bases(self) -> None:
        for index, ring in self._rings.items():
            if ring.in_device:
                ring.base_word = self._device.get_base(index).encode()
                ring.in_device = False

    def _ring(self, index: int) -> FrontendRing:
        if index >= self._device.identity.queue_count:
            why = f"the device has {self._device.identity.queue_count}, numbered from 0"
            raise VdpaBridgeError(f"queue {index}", why=why)
        return self._rings.setdefault(index, FrontendRing(index))

    def _stopped(self, index: int) -> FrontendRing:
        ring = self._settled(index)
        if ring.in_device:
            raise VdpaBridgeError(f"queue {index}", why="it is at work: GET_VRING_BASE stops it")
        return ring
