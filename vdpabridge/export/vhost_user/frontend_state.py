"""A front-end's transfer of device state: begun, checked, or abandoned."""

from __future__ import annotations

import os
from typing import TypeAlias

from ...device import Capability, Device, RunState, StateDirection, StatePhase
from ...linux.descriptors import discard
from .admission import is_channel

__all__ = ["FrontendState"]

TransferKind: TypeAlias = tuple[StateDirection, StatePhase]


class FrontendState:
    """A front-end's transfers of the state of ``device`` (borrowed)."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pending = False
        self.loaded = False
        """Whether state was loaded into the device, and no reset has dropped it."""

    def check_kind(self, direction: int, phase: int) -> TransferKind:
        """The kind of transfer that is asked for. Raises ValueError for a kind that does not exist."""
        return StateDirection(direction), StatePhase(phase)

    def begin(self, kind: TransferKind, fd: int) -> int | None:
        """Begin a transfer through ``fd``; takes ownership of it. Returns and raises as `Device.set_state_fd`."""
        direction, when = kind
        try:
            theirs = None if is_channel(fd) else os.pipe2(os.O_CLOEXEC)
        except BaseException:
            discard([fd])
            raise
        if theirs is None:
            instead = self._device.set_state_fd(direction, when, fd)
        else:
            discard([fd])
            instead = self._begin_through(theirs, direction, when)
        self._pending = True
        self.loaded = direction is StateDirection.LOAD
        return instead

    def _begin_through(self, pipe: tuple[int, int], direction: StateDirection, when: StatePhase) -> int:
        """Begin through ``pipe``, made by this process; takes ownership of it, and returns the front-end's end."""
        mine, theirs = pipe[::-1] if direction is StateDirection.SAVE else pipe
        try:
            instead = self._device.set_state_fd(direction, when, mine)
        except BaseException:
            os.close(theirs)
            raise
        if instead is None:
            return theirs
        os.close(theirs)
        return instead

    def check(self) -> None:
        """Wait for the end of the transfer, as long as the device's deadline allows. Raises as `Device.check_state`."""
        self._pending = False
        try:
            self._device.check_state()
        except BaseException:
            self.loaded = False
            raise

    def needs_fresh_device(self, kind: TransferKind, *, features_set: bool) -> bool:
        """Whether to reset the device first, because another front-end has left its features in it.

        State is loaded into a device without features: this front-end sets them later, and they may differ.
        """
        return (
            kind[0] is StateDirection.LOAD
            and not features_set
            and self._device.state is not RunState.RESET
            and Capability.STATE_RESET in self._device.capabilities
        )

    def forget(self) -> None:
        """The device was reset."""
        self._pending = self.loaded = False

    def abandon(self) -> None:
        """The front-end has left: drop a transfer that it has not checked."""
        if self._pending:
            self._pending = False
            self._device.abandon_state()
