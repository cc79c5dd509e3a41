"""vhost-user payloads: one type each, with ``pack`` and ``unpack``.

Source: docs/interop/vhost-user.rst of QEMU, "Message Specification"; padding where the C structures have it. This
module checks the lengths; other modules check what the values mean.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import ClassVar, Self

from .layout import Layout
from .vhost import VHOST_IOTLB_MSG_LAYOUT, VHOST_VRING_ADDR, VHOST_VRING_STATE
from .vhost_user import SHMEM_REGIONS

__all__ = [
    "U64",
    "Config",
    "DeviceStateTransfer",
    "Empty",
    "Inflight",
    "Iotlb",
    "Log",
    "MemoryTable",
    "Mmap",
    "Opaque",
    "Payload",
    "PayloadError",
    "Region",
    "SharedObject",
    "ShmemConfig",
    "SingleRegion",
    "VringAddr",
    "VringArea",
    "VringState",
]


class PayloadError(ValueError):
    """Bytes that are not a payload of the expected type."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A payload of fixed layout: the fields are the layout's, in order."""

    LAYOUT: ClassVar[Layout]

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self.LAYOUT.pack(*astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The payload in ``data``, which must hold nothing else. Raises `PayloadError`."""
        if len(data) != cls.LAYOUT.size_bytes:
            raise PayloadError(f"{cls.__name__} has {cls.LAYOUT.size_bytes} bytes, not {len(data)}")
        return cls(*cls.LAYOUT.unpack(data))


def _fields(c_name: str, *fields: tuple[str, str]) -> Layout:
    return Layout(c_name, "=", fields)


@dataclass(frozen=True, slots=True)
class Empty(Payload):
    """Nothing."""

    LAYOUT = _fields("empty")


@dataclass(frozen=True, slots=True)
class U64(Payload):
    """One number: features, a count, a status, an acknowledgement."""

    value: int
    LAYOUT = _fields("u64", ("value", "Q"))


@dataclass(frozen=True, slots=True)
class VringState(Payload):
    """A queue and a number: its size, its base, whether it is enabled."""

    index: int
    num: int
    LAYOUT = VHOST_VRING_STATE


@dataclass(frozen=True, slots=True)
class VringAddr(Payload):
    """Where a queue lies; used comes before avail."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int
    LAYOUT = VHOST_VRING_ADDR


@dataclass(frozen=True, slots=True)
class Region(Payload):
    """One memory region of a table."""

    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int
    LAYOUT = _fields(
        "VhostUserMemoryRegion",
        ("guest_phys_addr", "Q"),
        ("memory_size", "Q"),
        ("userspace_addr", "Q"),
        ("mmap_offset", "Q"),
    )


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """The region of ADD_MEM_REG and REM_MEM_REG: eight bytes of padding first."""

    region: Region
    LAYOUT = _fields("VhostUserMemRegMsg", ("padding", "Q"), ("region", "32s"))

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self.LAYOUT.pack(0, self.region.pack())

    @classmethod
    def unpack(cls, data: bytes) -> SingleRegion:
        """The payload in ``data``. Raises `PayloadError`."""
        if len(data) != cls.LAYOUT.size_bytes:
            raise PayloadError(f"SingleRegion has {cls.LAYOUT.size_bytes} bytes, not {len(data)}")
        return cls(Region.unpack(data[8:]))


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All of the guest's memory; one descriptor for each region comes with it."""

    regions: tuple[Region, ...]
    LAYOUT = _fields("VhostUserMemory", ("nregions", "I"), ("padding", "I"))

    def pack(self) -> bytes:
        """The payload's bytes: only the regions that exist, not the eight that the specification shows."""
        return self.LAYOUT.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> MemoryTable:
        """The table in ``data``. Raises `PayloadError`."""
        head, each = cls.LAYOUT.size_bytes, Region.LAYOUT.size_bytes
        if len(data) < head:
            raise PayloadError(f"MemoryTable has at least {head} bytes, not {len(data)}")
        count = cls.LAYOUT.unpack(data)[0]
        if len(data) != head + count * each:
            raise PayloadError(f"MemoryTable of {count} regions has {head + count * each} bytes, not {len(data)}")
        return cls(tuple(Region.unpack(data[at : at + each]) for at in range(head, len(data), each)))


@dataclass(frozen=True, slots=True)
class Log(Payload):
    """Where the dirty log lies in its file."""

    size_bytes: int
    offset: int
    LAYOUT = _fields("VhostUserLog", ("mmap_size", "Q"), ("mmap_offset", "Q"))


@dataclass(frozen=True, slots=True)
class Iotlb(Payload):
    """An IOTLB message: 32 bytes, the last six of them padding."""

    iova: int
    size_bytes: int
    user_address: int
    permission: int
    kind: int
    LAYOUT = VHOST_IOTLB_MSG_LAYOUT


@dataclass(frozen=True, slots=True)
class Config:
    """A piece of the configuration space; ``size_bytes`` is what the header says, ``data`` what follows the header."""

    offset: int
    size_bytes: int
    flags: int
    data: bytes
    LAYOUT = _fields("VhostUserConfig", ("offset", "I"), ("size", "I"), ("flags", "I"))

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self.LAYOUT.pack(self.offset, self.size_bytes, self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Config:
        """The payload in ``data``: ``size_bytes`` of content, or none if a back-end refuses. Raises `PayloadError`."""
        head = cls.LAYOUT.size_bytes
        if len(data) < head:
            raise PayloadError(f"Config has at least {head} bytes, not {len(data)}")
        offset, size, flags = cls.LAYOUT.unpack(data)
        if len(data) - head not in (0, size):
            raise PayloadError(f"Config says {size} bytes, and {len(data) - head} follow")
        return cls(offset, size, flags, data[head:])


@dataclass(frozen=True, slots=True)
class VringArea(Payload):
    """A host notifier: a queue (and a flag for "no descriptor") and a piece of a file."""

    index: int
    size_bytes: int
    offset: int
    LAYOUT = _fields("VhostUserVringArea", ("u64", "Q"), ("size", "Q"), ("offset", "Q"))


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """The in-flight region: 24 bytes, the last four of them padding that the specification does not mention."""

    size_bytes: int
    offset: int
    queue_count: int
    queue_size: int
    LAYOUT = _fields(
        "VhostUserInflight",
        ("mmap_size", "Q"),
        ("mmap_offset", "Q"),
        ("num_queues", "H"),
        ("queue_size", "H"),
        ("", "4x"),
    )


@dataclass(frozen=True, slots=True)
class SharedObject(Payload):
    """A shared object's UUID."""

    uuid: bytes
    LAYOUT = _fields("VhostUserShared", ("uuid", "16s"))


@dataclass(frozen=True, slots=True)
class DeviceStateTransfer(Payload):
    """Direction and phase of SET_DEVICE_STATE_FD."""

    direction: int
    phase: int
    LAYOUT = _fields("VhostUserTransferDeviceState", ("direction", "I"), ("phase", "I"))


@dataclass(frozen=True, slots=True)
class Mmap(Payload):
    """A piece of a file to be mapped into a shared memory region. Bit 0 of ``flags``: writable."""

    shmid: int
    fd_offset: int
    shm_offset: int
    size_bytes: int
    flags: int
    LAYOUT = _fields(
        "VhostUserMMap",
        ("shmid", "B"),
        ("", "7x"),
        ("fd_offset", "Q"),
        ("shm_offset", "Q"),
        ("len", "Q"),
        ("flags", "Q"),
    )


@dataclass(frozen=True, slots=True)
class ShmemConfig:
    """The sizes of the shared memory regions, by id; 0 for a region that does not exist."""

    sizes_bytes: tuple[int, ...]
    LAYOUT = _fields(
        "VhostUserShMemConfig", ("nregions", "I"), ("padding", "I"), *((f"size{n}", "Q") for n in range(SHMEM_REGIONS))
    )

    def pack(self) -> bytes:
        """The payload's bytes, always all 2056."""
        sizes = self.sizes_bytes + (0,) * (SHMEM_REGIONS - len(self.sizes_bytes))
        return self.LAYOUT.pack(sum(size > 0 for size in sizes), 0, *sizes)

    @classmethod
    def unpack(cls, data: bytes) -> ShmemConfig:
        """The payload in ``data``. Raises `PayloadError`."""
        if len(data) != cls.LAYOUT.size_bytes:
            raise PayloadError(f"ShmemConfig has {cls.LAYOUT.size_bytes} bytes, not {len(data)}")
        count, _, *sizes = cls.LAYOUT.unpack(data)
        if count != sum(size > 0 for size in sizes):
            raise PayloadError(f"ShmemConfig says {count} regions, and {sum(size > 0 for size in sizes)} have a size")
        return cls(tuple(sizes))


@dataclass(frozen=True, slots=True)
class Opaque:
    """Bytes that only two programs of one build understand (crypto sessions have C pointers in them)."""

    data: bytes

    def pack(self) -> bytes:
        """The bytes."""
        return self.data

    @classmethod
    def unpack(cls, data: bytes) -> Opaque:
        """The bytes, whatever they are."""
        return cls(data)
