"""The rings of a back-end: started and stopped one by one.

Source: docs/interop/vhost-user.rst, "Ring states". A ring starts with SET_VRING_KICK (said so in 2026, true before) and
stops with GET_VRING_BASE, after which a back-end has forgotten its eventfds: everything is sent again at each start.
"""

from __future__ import annotations

from ...abi.vhost import VHOST_VRING_F_LOG
from ...abi.vhost_user import VHOST_USER_F_PROTOCOL_FEATURES, VRING_NO_FD, FrontendRequest
from ...abi.vhost_user_payloads import U64, VringAddr, VringState
from ...abi.virtio import VIRTIO_F_RING_PACKED
from ...abi.vring_base import QueueBase, decode_base
from ...eventfds import signal
from ...transitions import Operation
from ...values import QueueRecord
from .requests import Requests

__all__ = ["Rings"]

_EVENTFD_REQUESTS = {
    Operation.SET_KICK: FrontendRequest.SET_VRING_KICK,
    Operation.SET_CALL: FrontendRequest.SET_VRING_CALL,
    Operation.SET_ERR: FrontendRequest.SET_VRING_ERR,
}
_INITIAL = {False: 0, True: 1 << 15 | 1 << 31}
"""The base of a fresh ring, split and packed."""


class Rings:
    """Which rings are started, and where the stopped ones stand. ``features`` are what the back-end offers."""

    def __init__(self, requests: Requests, features: int) -> None:
        self._requests = requests
        self._can_enable = bool(features >> VHOST_USER_F_PROTOCOL_FEATURES & 1)
        self.started: set[int] = set()
        self.bases: dict[int, QueueBase] = {}

    def base(self, index: int, accepted: int) -> QueueBase:
        """Where stopped queue ``index`` stands."""
        packed = _packed(accepted)
        return self.bases.get(index) or decode_base(_INITIAL[packed], packed=packed)

    def start(self, index: int, record: QueueRecord, accepted: int, *, logged: bool) -> None:
        """Start and enable queue ``index`` as ``record``, which was set up, has it."""
        if record.setup is None:
            raise ValueError(f"queue {index} was not set up")
        tell = self._requests.tell
        tell(FrontendRequest.SET_VRING_NUM, VringState(index, record.setup.size))
        tell(FrontendRequest.SET_VRING_BASE, VringState(index, self.base(index, accepted).encode()))
        self.send_address(index, record, logged=logged)
        for operation in (Operation.SET_CALL, Operation.SET_ERR, Operation.SET_KICK):
            self.bind(operation, index, record.eventfds.get(operation))
        self.started.add(index)
        if self._can_enable:
            tell(FrontendRequest.SET_VRING_ENABLE, VringState(index, 1))
        # kicks of before it was started went to nobody
        signal(record.eventfds.get(Operation.SET_KICK))

    def stop(self, index: int, accepted: int, *, drain: bool) -> None:
        """Stop queue ``index``, if it is started, and remember where it stands."""
        if index not in self.started:
            return
        request = FrontendRequest.GET_VRING_BASE if drain else FrontendRequest.GET_VRING_BASE_SKIP_DRAIN
        reply = self._requests.ask(request, VringState(index, 0))
        if reply.index != index:
            raise self._requests.no_reply(request, f"it is about queue {reply.index}, not {index}")
        word: int = reply.num
        self.bases[index] = decode_base(word, packed=_packed(accepted))
        self.started.discard(index)

    def enable(self, index: int, enabled: bool) -> None:
        """Enable or disable a started queue."""
        self._requests.tell(FrontendRequest.SET_VRING_ENABLE, VringState(index, int(enabled)))

    def bind(self, operation: Operation, index: int, eventfd: int | None) -> None:
        """Send ``eventfd`` (borrowed) for queue ``index``, or that there is none."""
        word = index | (VRING_NO_FD if eventfd is None else 0)
        self._requests.tell(_EVENTFD_REQUESTS[operation], U64(word), [] if eventfd is None else [eventfd])

    def send_address(self, index: int, record: QueueRecord, *, logged: bool) -> None:
        """Send where queue ``index`` lies, and whether writes to its used ring are to be logged."""
        if (setup := record.setup) is not None:
            flags, log = (1 << VHOST_VRING_F_LOG, setup.used_address) if logged else (0, 0)
            address = VringAddr(index, flags, setup.desc_address, setup.used_address, setup.avail_address, log)
            self._requests.tell(FrontendRequest.SET_VRING_ADDR, address)

    def forget(self) -> None:
        """After a reset."""
        self.started.clear()
        self.bases.clear()


def _packed(accepted: int) -> bool:
    return bool(accepted >> VIRTIO_F_RING_PACKED & 1)
