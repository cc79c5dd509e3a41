"""The transfer of a back-end's own state: one at a time, and only `BackendState.check` tells whether it succeeded.

Source: docs/interop/vhost-user.rst, "Migrating back-end state".
"""

from __future__ import annotations

import contextlib

from ...abi.vhost_user import DEVICE_STATE_NO_FD, FrontendRequest
from ...abi.vhost_user_payloads import DeviceStateTransfer
from ...device.values import StateDirection, StatePhase
from ...errors import PeerRefused
from ...linux.descriptors import discard
from .backend_requests import BackendRequests

__all__ = ["BackendState"]


class BackendState:
    """Transfers state with ``requests`` (borrowed)."""

    def __init__(self, requests: BackendRequests) -> None:
        self._requests = requests
        self._active = False

    def begin(self, direction: StateDirection, phase: StatePhase, fd: int) -> int | None:
        """Begin a transfer through ``fd`` (borrowed). Returns None, or a descriptor of the back-end's, owned by the
        caller.

        Raises `PeerRefused`.
        """
        reply, fds = self._requests.ask_with_fds(
            FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateTransfer(direction, phase), [fd]
        )
        code = reply.value & 0xFF
        if code or bool(fds) == bool(reply.value & DEVICE_STATE_NO_FD):
            discard(fds)
            why = f"the back-end refused it (code {code})" if code else f"a reply of {reply.value:#x}, {len(fds)} fds"
            raise self._refused(FrontendRequest.SET_DEVICE_STATE_FD, why, reply.value)
        self._active = True
        return fds[0] if fds else None

    def check(self) -> None:
        """Wait for the end of the transfer. Raises `PeerRefused` if it failed."""
        code = self._requests.ask_u64(FrontendRequest.CHECK_DEVICE_STATE)
        self._active = False
        if code:
            # passt's code is an errno, or all ones; rust-vmm's is always 1
            why = f"the back-end failed to process its state (code {code:#x}): its own log may say why"
            raise self._refused(FrontendRequest.CHECK_DEVICE_STATE, why, code)

    def abandon(self) -> None:
        """End a transfer that the caller will not check. No message does that; but the caller has closed the other end,
        so this asks whether the transfer has ended."""
        if self._active:
            with contextlib.suppress(PeerRefused):
                self.check()

    def _refused(self, request: FrontendRequest, why: str, code: int) -> PeerRefused:
        return PeerRefused(request.name, peer=self._requests.peer, why=why, request=request, code=code)
