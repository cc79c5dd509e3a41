"""The waist of the hourglass: the one interface to a virtio device that another program's guest is using.

Drivers (`vdpabridge.drivers`) implement `Device`; exporters and procedures use it, and do not depend on any driver.
"""

from ..abi.vring_base import PackedBase, QueueBase, SplitBase, decode_base
from .interface import Device
from .rules import Capability, Operation, RunState
from .values import (
    DirtyLog,
    Identity,
    InflightRegion,
    MemoryRegion,
    QueueRecord,
    QueueSetup,
    StateDirection,
    StatePhase,
)

__all__ = [
    "Capability",
    "Device",
    "DirtyLog",
    "Identity",
    "InflightRegion",
    "MemoryRegion",
    "Operation",
    "PackedBase",
    "QueueBase",
    "QueueRecord",
    "QueueSetup",
    "RunState",
    "SplitBase",
    "StateDirection",
    "StatePhase",
    "decode_base",
]
