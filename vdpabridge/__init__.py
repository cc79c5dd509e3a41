"""One device-state interface for virtio devices behind vhost-vdpa and vhost-user.

What this package offers to programs is in `__all__`, with `vdpabridge.guest` (a guest in miniature) and
`vdpabridge.drivers.registry` (for drivers in packages of their own). Everything else can change in any release.

Importing the package imports none of it: start-up time matters to the command line. A name is imported when it is used.
"""

from __future__ import annotations

__version__ = "0.1.0"

#: Module -> the names of it that are public. `__init__.pyi` has the same for type checkers.
_PUBLIC = {
    "abi.virtio": (
        "VIRTIO_F_RING_PACKED",
        "VIRTIO_F_VERSION_1",
        "VIRTIO_ID_BLOCK",
        "VIRTIO_ID_FS",
        "VIRTIO_ID_NET",
    ),
    "api": ("inspect", "load", "load_state", "migrate", "open", "save"),
    "bus": ("Bus", "BusDevice"),
    "bus.events": ("BusEvent", "BusEvents"),
    "control.client": ("ControlClient", "ControlError"),
    "device": (
        "Capability",
        "Device",
        "DirtyLog",
        "Identity",
        "InflightRegion",
        "MemoryRegion",
        "PackedBase",
        "QueueSetup",
        "RunState",
        "SplitBase",
        "StateDirection",
        "StatePhase",
    ),
    "errors": (
        "BusError",
        "ConnectionLost",
        "DeadlineExceeded",
        "DeviceBusy",
        "DeviceFailed",
        "DeviceHeld",
        "FeatureError",
        "KernelError",
        "MissingCapability",
        "NoSuchDevice",
        "OwnershipError",
        "PeerRefused",
        "ProtocolError",
        "StateError",
        "UsageError",
        "VdpaBridgeError",
    ),
    "export.vhost_user.server": ("Server", "listen"),
    "state.image.reader": ("ImageError",),
    "state.losses": ("Loss", "StateWouldBeLost"),
    "state.procedures": ("Advice", "ProcedureFailed"),
    "state.replay": ("ReplayFailed", "resume"),
    "state.report": ("Report", "Step"),
    "state.snapshot": (
        "DeviceSnapshot",
        "QueueEventfds",
        "QueueSnapshot",
        "SnapshotError",
        "capture",
        "restore",
    ),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  # all of them are names


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
