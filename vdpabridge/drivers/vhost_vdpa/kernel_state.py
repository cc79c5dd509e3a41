"""Device state by vhost-vdpa's requests, which the kernel patches of this project propose."""

from __future__ import annotations

import errno
import os
import time

from ...abi.vhost import (
    VHOST_VDPA_DEVICE_STATE,
    VHOST_VDPA_DEVICE_STATE_CANCEL,
    VHOST_VDPA_DEVICE_STATE_STOPPED,
    VhostIoctl as Ioctl,
)
from ...device import StateDirection, StatePhase
from ...errors import DeadlineExceeded, KernelError
from ...linux.deadline import Deadline
from ...linux.descriptors import discard
from .node import Node

__all__ = ["KernelState"]

#: How often to ask whether a transfer has ended: the kernel does not wait for that.
_ASK_AGAIN_S = 0.002
_NO_FD = -1


class KernelState:
    """The transfers of device state through ``node`` (borrowed). The kernel makes a descriptor for each."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._begun: bytearray | None = None
        """The argument of a request that may have begun a transfer."""
        self._handed_out = False
        """Whether the caller owns the descriptor in it."""

    def begin(self, direction: StateDirection, phase: StatePhase) -> int:
        """Begin a transfer, ending one that was not checked; returns the kernel's descriptor, owned by the caller.

        Raises `KernelError`.
        """
        self.abandon()
        argument = VHOST_VDPA_DEVICE_STATE.buffer(direction, phase, _NO_FD, 0)
        self._begun, self._handed_out = argument, False
        try:
            self._node.call(Ioctl.VHOST_VDPA_SET_DEVICE_STATE_FD, argument)
        except KernelError:
            self._begun = None
            raise
        fd = _descriptor(argument)
        # it never blocks; whoever writes it need not look for how much fits
        os.set_blocking(fd, False)
        self._handed_out = True
        return fd

    def check(self, deadline: Deadline) -> None:
        """Wait for the end of the transfer. Raises `KernelError` if it failed, `DeadlineExceeded`."""
        while True:
            try:
                self._node.call(Ioctl.VHOST_VDPA_CHECK_DEVICE_STATE)
            except KernelError as error:
                if error.errno != errno.EBUSY:
                    self._begun = None
                    raise
                left_s = deadline.left_s()
                if left_s is not None and left_s <= _ASK_AGAIN_S:
                    why = "the other end has not closed its descriptor, or has not read everything"
                    raise DeadlineExceeded(
                        "device state transfer", deadline.timeout_s or 0, device=self._node.path, why=why
                    ) from None
                time.sleep(_ASK_AGAIN_S)
            else:
                self._begun = None
                return

    def abandon(self) -> None:
        """End a transfer that will not be checked, without effect. Raises `KernelError`."""
        if self._begun is None:
            return
        cancel = VHOST_VDPA_DEVICE_STATE.buffer(
            VHOST_VDPA_DEVICE_STATE_CANCEL, VHOST_VDPA_DEVICE_STATE_STOPPED, _NO_FD, 0
        )
        self._node.call(Ioctl.VHOST_VDPA_SET_DEVICE_STATE_FD, cancel)
        self.forget()

    def forget(self) -> None:
        """The kernel has ended the transfer: the device was reset, or closed."""
        begun, self._begun = self._begun, None
        # the deadline passed while the request was in the kernel: then nobody else closes what it has made
        if begun is not None and not self._handed_out and (fd := _descriptor(begun)) != _NO_FD:
            discard([fd])


def _descriptor(argument: bytearray) -> int:
    fd: int = VHOST_VDPA_DEVICE_STATE.unpack(argument)[2]
    return fd
