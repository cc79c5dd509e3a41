"""Virtio devices that exist in this process only: the embedded default, a test double, a peer for any front-end."""

from .driver import Sim
from .model import Faults

__all__ = ["Faults", "Sim"]
