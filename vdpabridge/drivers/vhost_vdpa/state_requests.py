"""The requests by which a kernel transfers device state: those of this project's proposal, or of somebody else's."""

from __future__ import annotations

from dataclasses import dataclass

from ...abi.vhost import (
    VHOST_BACKEND_F_DEVICE_STATE,
    VHOST_VDPA_DEVICE_STATE,
    VHOST_VDPA_DEVICE_STATE_CANCEL,
    VHOST_VDPA_DEVICE_STATE_LOAD,
    VHOST_VDPA_DEVICE_STATE_SAVE,
    VHOST_VDPA_DEVICE_STATE_STOPPED,
    VhostIoctl as Ioctl,
)

__all__ = ["OURS", "RETURNED", "StateRequest", "StateRequests"]

#: The kernel returns the descriptor, and does not put it into the argument.
RETURNED = -1
_NO_FD = -1


@dataclass(frozen=True, slots=True)
class StateRequest:
    """One request: its number, and its argument as it is given to the kernel; empty if it has none."""

    number: Ioctl | int
    argument: bytes = b""
    fd_offset: int = RETURNED
    """Where in the argument the kernel puts the descriptor, or `RETURNED`."""


@dataclass(frozen=True, slots=True)
class StateRequests:
    """What transfers device state, if a device offers ``feature`` (a bit of GET_BACKEND_FEATURES)."""

    feature: int
    save: StateRequest
    load: StateRequest
    check: StateRequest
    cancel: StateRequest | None = None
    """Without it, a transfer is abandoned by checking it."""


def _ours(direction: int) -> StateRequest:
    argument = VHOST_VDPA_DEVICE_STATE.pack(direction, VHOST_VDPA_DEVICE_STATE_STOPPED, _NO_FD, 0)
    return StateRequest(Ioctl.VHOST_VDPA_SET_DEVICE_STATE_FD, argument, VHOST_VDPA_DEVICE_STATE.offsets["fd"])


OURS = StateRequests(
    VHOST_BACKEND_F_DEVICE_STATE,
    save=_ours(VHOST_VDPA_DEVICE_STATE_SAVE),
    load=_ours(VHOST_VDPA_DEVICE_STATE_LOAD),
    check=StateRequest(Ioctl.VHOST_VDPA_CHECK_DEVICE_STATE),
    cancel=_ours(VHOST_VDPA_DEVICE_STATE_CANCEL),
)
