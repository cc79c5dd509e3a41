"""Groups of queues: those of one group see the same address space."""

from __future__ import annotations

from collections.abc import Mapping

from ...abi.vhost import VhostIoctl as Ioctl
from ...device import QueueSetup
from .kernel_requests import KernelRequests

__all__ = ["Groups"]


class Groups:
    """The groups of ``device``'s queues; ``ask`` (borrowed) asks once for each queue: some devices have hundreds.

    ``rings_apart``: the device may have a queue's rings in another group than its buffers (DESC_ASID).
    """

    def __init__(self, device: str, ask: KernelRequests, *, rings_apart: bool) -> None:
        self._device = device
        self._ask = ask
        self._rings_apart = rings_apart
        self._known: dict[tuple[Ioctl, int], int] = {}
        self._spaces: dict[int, int] = {}
        """Group -> the address space that it was given since the last reset."""

    def of_buffers(self, index: int) -> int:
        """The group of queue ``index``."""
        return self._get(Ioctl.VHOST_VDPA_GET_VRING_GROUP, index)

    def of_rings(self, index: int) -> int:
        """The group of queue ``index``'s rings. Raises `KernelError` if the device does not distinguish the two."""
        return self._get(Ioctl.VHOST_VDPA_GET_VRING_DESC_GROUP, index)

    def assign(self, index: int, address_space: int, setups: Mapping[int, QueueSetup]) -> None:
        """Let the groups of queue ``index`` see ``address_space``; ``setups`` are those of all queues that have one.

        Raises ValueError if another queue of these groups is in another address space.
        """
        mine = self._of(index)
        for other, setup in setups.items():
            if other != index and setup.address_space != address_space and mine & self._of(other):
                why = f"queue {other}, of the same group, is in address space {setup.address_space}"
                raise ValueError(f"{self._device}: address space {address_space} for queue {index}: {why}")
        for group in sorted(mine):
            if self._spaces.get(group) != address_space:
                # this request has a group in the place where other requests have a queue
                self._ask.set_of_queue(Ioctl.VHOST_VDPA_SET_GROUP_ASID, group, address_space)
                self._spaces[group] = address_space

    def forget(self) -> None:
        """Forget the address spaces, after a reset: mlx5 puts all groups into address space 0."""
        self._spaces.clear()

    def _of(self, index: int) -> set[int]:
        """The groups of queue ``index``. mlx5 looks rings up in the space of their own group, even if DESC_ASID is not
        accepted: a caller that leaves DESC_ASID out leaves the rings in space 0."""
        return {self.of_buffers(index), *([self.of_rings(index)] if self._rings_apart else [])}

    def _get(self, request: Ioctl, index: int) -> int:
        # a device does not regroup its queues
        if (request, index) not in self._known:
            self._known[request, index] = self._ask.get_of_queue(request, index)
        return self._known[request, index]
