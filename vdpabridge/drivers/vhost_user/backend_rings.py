"""The rings of a back-end: started and stopped one by one.

Source: docs/interop/vhost-user.rst, "Ring states". A ring starts with SET_VRING_KICK (the text says so since 2026, but
it was true before) and stops with GET_VRING_BASE. After that a back-end has forgotten the ring's eventfds, so
everything is sent again at each start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...abi.vhost import VHOST_VRING_F_LOG
from ...abi.vhost_user import VHOST_USER_F_PROTOCOL_FEATURES, VRING_NO_FD, FrontendRequest
from ...abi.vhost_user_payloads import U64, VringAddr, VringState
from ...abi.virtio import VIRTIO_F_RING_PACKED
from ...abi.vring_base import QueueBase, decode_base
from ...device.rules import Operation
from ...device.values import QueueRecord, QueueSetup
from ...errors import PeerRefused
from ...linux.eventfds import signal
from .backend_requests import BackendRequests, Told

__all__ = ["BackendRings"]

_EVENTFD_REQUESTS = {
    Operation.SET_KICK: FrontendRequest.SET_VRING_KICK,
    Operation.SET_CALL: FrontendRequest.SET_VRING_CALL,
    Operation.SET_ERR: FrontendRequest.SET_VRING_ERR,
}
_INITIAL = {False: 0, True: 1 << 15 | 1 << 31}
"""The base of a fresh ring, split and packed."""


class BackendRings:
    """Which rings are started, and where the stopped ones stand. ``features`` are what the back-end offers."""

    def __init__(self, requests: BackendRequests, features: int) -> None:
        self._requests = requests
        self._can_enable = bool(features >> VHOST_USER_F_PROTOCOL_FEATURES & 1)
        self.started: set[int] = set()
        self.bases: dict[int, QueueBase] = {}
        self._packed = False
        requests.on_late = self._stopped_late

    def base(self, index: int, accepted: int) -> QueueBase:
        """Where stopped queue ``index`` stands."""
        packed = _packed(accepted)
        return self.bases.get(index) or decode_base(_INITIAL[packed], packed=packed)

    def start(self, records: Mapping[int, QueueRecord], accepted: int, *, logged: bool) -> None:
        """Start and enable the queues of ``records``, which were set up, in two bursts: where they are, then the kicks.

        Before the second burst it is certain that nothing runs, whatever fails. If the back-end refuses the second, the
        rings are stopped again; the back-end then says where they stand, because some of them may have been at work.
        """
        where = [each for item in records.items() for each in self._where(*item, accepted, logged=logged)]
        self._requests.tell_all(where)
        self.started.update(records)
        try:
            self._requests.tell_all(each for item in records.items() for each in self._begin(*item))
        except PeerRefused:
            for index in records:
                self.stop(index, accepted, drain=True)
            raise
        for record in records.values():
            # kicks from before the start reached nobody
            signal(record.eventfds.get(Operation.SET_KICK))

    def _where(self, index: int, record: QueueRecord, accepted: int, *, logged: bool) -> list[Told]:
        if record.setup is None:
            raise ValueError(f"queue {index} was not set up")
        base = self.base(index, accepted).encode()
        return [
            (FrontendRequest.SET_VRING_NUM, VringState(index, record.setup.size), ()),
            (FrontendRequest.SET_VRING_BASE, VringState(index, base), ()),
            (FrontendRequest.SET_VRING_ADDR, _address(index, record.setup, logged=logged), ()),
            *(_eventfd(each, index, record.eventfds.get(each)) for each in (Operation.SET_CALL, Operation.SET_ERR)),
        ]

    def _begin(self, index: int, record: QueueRecord) -> list[Told]:
        kick = _eventfd(Operation.SET_KICK, index, record.eventfds.get(Operation.SET_KICK))
        if not self._can_enable:
            return [kick]
        return [kick, (FrontendRequest.SET_VRING_ENABLE, VringState(index, 1), ())]

    def stop(self, index: int, accepted: int, *, drain: bool) -> None:
        """Stop queue ``index``, if it is started, and remember where it stands."""
        if index not in self.started:
            return
        self._packed = _packed(accepted)
        request = FrontendRequest.GET_VRING_BASE if drain else FrontendRequest.GET_VRING_BASE_SKIP_DRAIN
        reply = self._requests.ask(request, VringState(index, 0))
        if reply.index != index:
            raise self._requests.no_reply(request, f"it is about queue {reply.index}, not {index}")
        self._note_stopped(reply)

    def _note_stopped(self, reply: VringState) -> None:
        self.bases[reply.index] = decode_base(reply.num, packed=self._packed)
        self.started.discard(reply.index)

    def _stopped_late(self, request: FrontendRequest, reply: Any) -> None:
        """Note a ring that has stopped after the wait for that was given up."""
        if request in (FrontendRequest.GET_VRING_BASE, FrontendRequest.GET_VRING_BASE_SKIP_DRAIN):
            self._note_stopped(reply)

    def enable(self, index: int, enabled: bool) -> None:
        """Enable or disable a started queue."""
        self._requests.tell(FrontendRequest.SET_VRING_ENABLE, VringState(index, int(enabled)))

    def bind(self, operation: Operation, index: int, eventfd: int | None) -> None:
        """Send ``eventfd`` (borrowed) for queue ``index``; None says that there is none."""
        self._requests.tell_all([_eventfd(operation, index, eventfd)])

    def log(self, records: Mapping[int, QueueRecord], *, logged: bool) -> None:
        """Tell the back-end, for every started queue, whether to log writes to its used ring."""
        setups = {index: records[index].setup for index in sorted(self.started)}
        self._requests.tell_all(
            [
                (FrontendRequest.SET_VRING_ADDR, _address(index, setup, logged=logged), ())
                for index, setup in setups.items()
                if setup is not None
            ]
        )

    def forget(self) -> None:
        """Forget all queues, after a reset."""
        self.started.clear()
        self.bases.clear()


def _address(index: int, setup: QueueSetup, *, logged: bool) -> VringAddr:
    flags, log = (1 << VHOST_VRING_F_LOG, setup.used_address) if logged else (0, 0)
    return VringAddr(index, flags, setup.desc_address, setup.used_address, setup.avail_address, log)


def _eventfd(operation: Operation, index: int, eventfd: int | None) -> Told:
    word = U64(index | (VRING_NO_FD if eventfd is None else 0))
    return _EVENTFD_REQUESTS[operation], word, () if eventfd is None else (eventfd,)


def _packed(accepted: int) -> bool:
    return bool(accepted >> VIRTIO_F_RING_PACKED & 1)
