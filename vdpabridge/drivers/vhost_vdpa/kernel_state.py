"""Device state by vhost-vdpa's requests."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time

from ...device import StateDirection, StatePhase
from ...errors import DeadlineExceeded, KernelError, VdpaBridgeError
from ...linux.deadline import Deadline
from ...linux.descriptors import discard
from .node import Node
from .state_requests import RETURNED, StateRequest, StateRequests

__all__ = ["KernelState"]

#: How often to ask whether a transfer has ended: the kernel does not wait for that.
_ASK_AGAIN_S = 0.002
_NO_FD = -1


class KernelState:
    """The transfers of device state through ``node`` (borrowed). The kernel makes a descriptor for each."""

    def __init__(self, node: Node, requests: StateRequests) -> None:
        self._node = node
        self._requests = requests
        self._begun = False
        """Whether a request may have begun a transfer that was not checked."""
        self._unowned: tuple[bytearray, int] | None = None
        """The argument of a request whose descriptor nobody has got, and where in it that is."""

    def begin(self, direction: StateDirection, phase: StatePhase) -> int:
        """Begin a transfer, ending one that was not checked; returns the kernel's descriptor, owned by the caller.

        Raises `KernelError`.
        """
        if phase is not StatePhase.STOPPED:
            raise VdpaBridgeError("begin a transfer", device=self._node.path, why=f"no transfer in phase {phase.name}")
        self.abandon()
        request = self._requests.save if direction is StateDirection.SAVE else self._requests.load
        argument = bytearray(request.argument)
        self._begun = True
        self._unowned = None if request.fd_offset == RETURNED else (argument, request.fd_offset)
        try:
            returned = self._node.call(request.number, argument or 0)
        except KernelError:
            self._begun, self._unowned = False, None
            raise
        fd = returned if request.fd_offset == RETURNED else _descriptor(argument, request.fd_offset)
        # it never blocks; whoever writes it need not look for how much fits
        os.set_blocking(fd, False)
        self._unowned = None
        return fd

    def check(self, deadline: Deadline) -> None:
        """Wait for the end of the transfer. Raises `KernelError` if it failed, `DeadlineExceeded`."""
        is_open = False
        while True:
            try:
                self._ask(self._requests.check)
            except KernelError as error:
                if error.errno != errno.EBUSY:
                    self._begun = False
                    raise
                is_open = True
                time.sleep(_ASK_AGAIN_S)
            except DeadlineExceeded:
                if not is_open or self._node.stuck:
                    raise
                why = "the other end has not closed its descriptor, or has not read everything"
                raise DeadlineExceeded(
                    "device state transfer", deadline.timeout_s or 0, device=self._node.path, why=why
                ) from None
            else:
                self._begun = False
                return

    @property
    def keeps_what_is_abandoned(self) -> bool:
        """Whether nothing but a check ends a transfer: then a load whose descriptor is closed has its effect."""
        return self._requests.cancel is None

    def abandon(self) -> None:
        """End a transfer that will not be checked, without effect. Raises `KernelError`."""
        if not self._begun:
            return
        if self._requests.cancel is not None:
            self._ask(self._requests.cancel)
        else:
            with contextlib.suppress(KernelError):
                self._ask(self._requests.check)
        self.forget()

    def forget(self) -> None:
        """The kernel has ended the transfer: the device was reset, or closed."""
        self._begun = False
        unowned, self._unowned = self._unowned, None
        # the deadline passed while the request was in the kernel: then nobody else closes what it has made
        if unowned is not None and (fd := _descriptor(*unowned)) != _NO_FD:
            discard([fd])

    def _ask(self, request: StateRequest) -> None:
        self._node.call(request.number, bytearray(request.argument) or 0)


def _descriptor(argument: bytearray, offset: int) -> int:
    return int.from_bytes(argument[offset : offset + 4], sys.byteorder, signed=True)
