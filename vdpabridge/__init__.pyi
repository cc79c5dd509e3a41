"""What `vdpabridge` offers, for type checkers; `__init__.py` imports it lazily, and a test compares the two."""

from .abi.virtio import (
    VIRTIO_F_RING_PACKED as VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1 as VIRTIO_F_VERSION_1,
    VIRTIO_ID_BLOCK as VIRTIO_ID_BLOCK,
    VIRTIO_ID_FS as VIRTIO_ID_FS,
    VIRTIO_ID_NET as VIRTIO_ID_NET,
)
from .api import (
    inspect as inspect,
    load as load,
    load_state as load_state,
    migrate as migrate,
    open as open,
    save as save,
)
from .bus import Bus as Bus, BusDevice as BusDevice
from .bus.events import BusEvent as BusEvent, BusEvents as BusEvents
from .control.client import ControlClient as ControlClient, ControlError as ControlError
from .device import (
    Capability as Capability,
    Device as Device,
    DirtyLog as DirtyLog,
    Identity as Identity,
    InflightRegion as InflightRegion,
    MemoryRegion as MemoryRegion,
    PackedBase as PackedBase,
    QueueSetup as QueueSetup,
    RunState as RunState,
    SplitBase as SplitBase,
    StateDirection as StateDirection,
    StatePhase as StatePhase,
)
from .errors import (
    BusError as BusError,
    ConnectionLost as ConnectionLost,
    DeadlineExceeded as DeadlineExceeded,
    DeviceBusy as DeviceBusy,
    DeviceFailed as DeviceFailed,
    DeviceHeld as DeviceHeld,
    FeatureError as FeatureError,
    KernelError as KernelError,
    MissingCapability as MissingCapability,
    NoSuchDevice as NoSuchDevice,
    OwnershipError as OwnershipError,
    PeerRefused as PeerRefused,
    ProtocolError as ProtocolError,
    StateError as StateError,
    UsageError as UsageError,
    VdpaBridgeError as VdpaBridgeError,
)
from .export.vhost_user.server import Server as Server, listen as listen
from .state.image.reader import ImageError as ImageError
from .state.losses import Loss as Loss, StateWouldBeLost as StateWouldBeLost
from .state.procedures import Advice as Advice, ProcedureFailed as ProcedureFailed
from .state.replay import ReplayFailed as ReplayFailed, resume as resume
from .state.report import Report as Report, Step as Step
from .state.snapshot import (
    DeviceSnapshot as DeviceSnapshot,
    QueueEventfds as QueueEventfds,
    QueueSnapshot as QueueSnapshot,
    SnapshotError as SnapshotError,
    capture as capture,
    restore as restore,
)

__version__: str
