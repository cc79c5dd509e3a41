"""What a simulated device does with requests, apart from how they reach it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ...errors import VdpaBridgeError
from .ring import Chain

__all__ = ["Died", "Faults", "Loaded", "Model", "StateRefused", "parsed_facts"]


class Died(Exception):
    """The device has died of a fault that a test asked for."""


class StateRefused(VdpaBridgeError):
    """State that the device does not take, or cannot give."""

    def __init__(self, why: str) -> None:
        super().__init__("device state", why=why)


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Loaded:
    """State that has arrived whole: `commit` makes it the device's, `discard` drops it. One of them is called, once."""

    commit: Callable[[], None]
    discard: Callable[[], None] = _nothing


@dataclass(slots=True)
class Faults:
    """What a test wants to go wrong; all off by default. May be changed at any time."""

    refuse_transfer: bool = False
    """`Device.set_state_fd` fails."""
    fail_check: bool = False
    """`Device.check_state` fails although the transfer went well."""
    cut_state_bytes: int | None = None
    """A save ends after this many bytes, without an error."""
    version: int | None = None
    """A save claims this format version."""
    stall_s: float = 0.0
    """A transfer waits this long before its first byte."""
    die_in_transfer: bool = False
    """The device dies at the end of the transfer."""
    die_after_requests: int | None = None
    """The device dies when it has answered this many."""
    fail_requests: bool = False
    """Requests are answered with the device's I/O error."""
    latency_s: float = 0.0
    """Requests stay in flight this long."""


class Model(ABC):
    """A kind of virtio device. Its methods are called by one thread at a time."""

    device_id: int
    features: int
    """Virtio features beside those of the rings."""
    queue_count: int

    @abstractmethod
    def config(self) -> bytes:
        """The configuration space."""

    def write_config(self, offset: int, data: bytes) -> bool:
        """Apply a write; read-only fields stay as they are. Returns whether something changed."""
        del offset, data
        return False

    @abstractmethod
    def handle(self, chain: Chain, *, fail: bool) -> None:
        """Answer the request in ``chain``; with an I/O error if ``fail``. Raises `BadAddress` for a bad address."""

    @abstractmethod
    def save(self) -> Iterator[bytes]:
        """The state, in chunks. The device does nothing else meanwhile."""

    @abstractmethod
    def load(self, chunks: Iterable[bytes]) -> Loaded:
        """Read state, to the end of ``chunks``. Raises `StateRefused`, and what ``chunks`` raises."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what a guest's driver has caused."""

    def close(self) -> None:
        """Let go of what the model holds. Idempotent."""
        return


def parsed_facts(text: bytes) -> dict[str, object]:
    """The JSON object in ``text``, a part of a state. Raises `StateRefused`."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise StateRefused("it does not begin with a description of the device")
    return facts
