"""Which eventfds the kernel may have: it listens to them through a reset, although the device forgets its part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ...abi.vhost import VHOST_FILE_UNBIND, VhostIoctl as Ioctl
from ...device import Operation
from ...errors import VdpaBridgeError
from .kernel_requests import KernelRequests

__all__ = ["KernelEventfds"]

_REQUESTS = {
    Operation.SET_KICK: Ioctl.VHOST_SET_VRING_KICK,
    Operation.SET_CALL: Ioctl.VHOST_SET_VRING_CALL,
    Operation.SET_ERR: Ioctl.VHOST_SET_VRING_ERR,
}


class KernelEventfds:
    """The eventfds that the kernel was given by ``ask`` (borrowed)."""

    def __init__(self, ask: KernelRequests) -> None:
        self._ask = ask
        self._bound: set[tuple[Operation, int]] = set()
        """Those that the kernel may have been given since the last reset."""

    def bind(self, operation: Operation, index: int, eventfd: int | None) -> None:
        """Have the kernel use ``eventfd`` (borrowed), or none, as ``operation`` says.

        For queue ``index``, or for changes of the configuration space.
        """
        with self._booked(operation, index):
            if operation is Operation.SET_CONFIG_CALL:
                self._ask.set(Ioctl.VHOST_VDPA_SET_CONFIG_CALL, VHOST_FILE_UNBIND if eventfd is None else eventfd)
            else:
                self._ask.set_eventfd(_REQUESTS[operation], index, eventfd)

    def unbind_all(self) -> None:
        """Have the kernel let go of all of them, after a reset."""
        for operation, index in sorted(self._bound, key=str):
            self.bind(operation, index, None)
        self._bound.clear()

    @contextlib.contextmanager
    def _booked(self, operation: Operation, index: int) -> Iterator[None]:
        """The body gives the kernel an eventfd; if it raises, it may have done so too."""
        key = operation, index
        is_new = key not in self._bound
        self._bound.add(key)
        try:
            yield
        except VdpaBridgeError as error:
            if is_new and error.nothing_done:
                self._bound.discard(key)
            raise
