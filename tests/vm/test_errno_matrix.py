"""The kernel's answers to wrong and right requests, one row each: bare ioctls, so that the kernel itself is tested.

vdpa_sim_blk with its default parameters: one queue, one group, one address space.
"""

import fcntl
import mmap
import os
import struct
from contextlib import contextmanager
from errno import EBADF, EBUSY, EFAULT, EINVAL, ENOBUFS, ENOTTY, EOPNOTSUPP, EPERM

import pytest

from vdpabridge.abi.vhost import VHOST_MSG_V2_LAYOUT, VhostIoctl as Ioctl
from vdpabridge.errors import ENOTSUPP
from vdpabridge.linux.mappings import SharedMapping

from ..support.release import since
from .conftest import PINS

PLATFORM = 1 << 33 | 1 << 32
UPDATE, INVALIDATE, RW = 2, 3, 3


class Raw:
    """A freshly opened node, and nothing that knows better."""

    def __init__(self, node):
        self.node = node
        self.fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        self.file = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)

    def close(self):
        os.close(self.file)
        os.close(self.fd)

    def ioctl(self, request, code="", *values):
        buffer = bytearray(struct.pack("=" + code, *values)) if code else 0
        fcntl.ioctl(self.fd, request, buffer)
        return struct.unpack("=" + code, buffer) if code else ()

    def own(self):
        self.ioctl(Ioctl.VHOST_SET_OWNER)
        return self

    def negotiate(self):
        self.own()
        for status in (1, 3):
            self.status(status)
        self.ioctl(Ioctl.VHOST_SET_FEATURES, "Q", PLATFORM)
        self.status(0xB)
        return self

    def run(self):
        self.negotiate()
        self.ioctl(Ioctl.VHOST_SET_VRING_NUM, "II", 0, 16)
        self.status(0xF)
        return self

    def suspend(self):
        self.run()
        self.ioctl(Ioctl.VHOST_VDPA_SUSPEND)
        return self

    def status(self, value):
        return self.ioctl(Ioctl.VHOST_VDPA_SET_STATUS, "B", value)

    def address(self, avail=0x2000, flags=0):
        return self.ioctl(Ioctl.VHOST_SET_VRING_ADDR, "IIQQQQ", 0, flags, 0x1000, 0x3000, avail, 0)

    def iotlb(self, kind, iova=0x10000, size=0x10000, address=0, asid=0, perm=RW, header=2):
        message = VHOST_MSG_V2_LAYOUT.pack(header, asid, iova, size, address, perm, kind)
        return (os.write(self.fd, message),)


@contextmanager
def shared_memory():
    fd = os.memfd_create("rows", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 16)
    with SharedMapping(fd, 1 << 16) as mapping:
        os.close(fd)
        yield mapping.address


def with_memory(action):
    def row(raw):
        with shared_memory() as address:
            return action(raw, address)

    return row


def private_update(raw):
    """Private anonymous memory."""
    memory = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    from vdpabridge.linux._libc import ffi

    return raw.own().iotlb(UPDATE, address=int(ffi.cast("uintptr_t", ffi.from_buffer(memory))))


def overlap(raw, address):
    raw.own().iotlb(UPDATE, address=address)
    return raw.iotlb(UPDATE, iova=0x18000, size=0x1000, address=address)


def foreign_address_space(raw, address):
    raw.own().ioctl(Ioctl.VHOST_SET_BACKEND_FEATURES, "Q", 1 << 1 | 1 << 3)
    return raw.iotlb(UPDATE, address=address, asid=1)


def invalidate_unmapped_range(raw, address):
    raw.own().iotlb(UPDATE, address=address)
    return raw.iotlb(INVALIDATE, iova=0x900000)


def resume_twice(raw):
    raw.suspend().ioctl(Ioctl.VHOST_VDPA_RESUME)
    return raw.ioctl(Ioctl.VHOST_VDPA_RESUME)


def update_of(address):
    return VHOST_MSG_V2_LAYOUT.pack(2, 0, 0x10000, 0x10000, address, RW, UPDATE)


def short_update(raw, address):
    return (os.write(raw.own().fd, update_of(address)[:40]),)


def private_then_shared_update(raw, address):
    """Where private memory was skipped there is room for another mapping of the same range; where it is pinned, not."""
    private_update(raw)
    return raw.iotlb(UPDATE, address=address)


def suspend_too_early_then_run(raw):
    """Had the SUSPEND had an effect, ADDR would be taken as of a suspended device."""
    raw.negotiate().ioctl(Ioctl.VHOST_VDPA_SUSPEND)
    raw.ioctl(Ioctl.VHOST_SET_VRING_NUM, "II", 0, 16)
    raw.status(0xF)
    return raw.address()


def kick_with(fd_of):
    def row(raw):
        return raw.own().ioctl(Ioctl.VHOST_SET_VRING_KICK, "Ii", 0, fd_of(raw))

    return row


backend = Ioctl.VHOST_SET_BACKEND_FEATURES
group = Ioctl.VHOST_VDPA_SET_GROUP_ASID

#: (what, what is done to a freshly opened node, errno where it is an int, else the value that comes back). A write
#: comes back as (bytes written,).
ROWS = [
    ("open twice", lambda raw: os.open(raw.node, os.O_RDWR), EBUSY),
    ("read", lambda raw: os.read(raw.fd, 72), EINVAL),
    ("SET_VRING_NUM before SET_OWNER", lambda raw: raw.ioctl(Ioctl.VHOST_SET_VRING_NUM, "II", 0, 16), EPERM),
    ("GET_VRING_BASE before SET_OWNER", lambda raw: raw.ioctl(Ioctl.VHOST_GET_VRING_BASE, "II", 0, 0), EPERM),
    ("SET_VRING_ENABLE before SET_OWNER", lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_SET_VRING_ENABLE, "II", 0, 1), EPERM),
    ("an unknown request before SET_OWNER", lambda raw: raw.ioctl(0x4008AFEE, "II", 0, 0), EPERM),
    ("SUSPEND before SET_OWNER", lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_SUSPEND), ()),
    ("RESUME before SET_OWNER", lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_RESUME), since((6, 3), (), before=EPERM)),
    ("GET_STATUS before SET_OWNER", lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_GET_STATUS, "B", 9), (0,)),
    ("SET_STATUS before SET_OWNER", lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_SET_STATUS, "B", 1), (1,)),
    (
        "GET_CONFIG before SET_OWNER",
        lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_GET_CONFIG, "IIQ", 0, 8, 0),
        (0, 8, 0x40000),
    ),
    ("UPDATE before SET_OWNER", with_memory(lambda raw, address: raw.iotlb(UPDATE, address=address)), EFAULT),
    ("SET_OWNER twice", lambda raw: raw.own().own(), EBUSY),
    ("SET_VRING_NUM of queue 1", lambda raw: raw.own().ioctl(Ioctl.VHOST_SET_VRING_NUM, "II", 1, 16), ENOBUFS),
    ("GET_VRING_BASE of queue 1", lambda raw: raw.own().ioctl(Ioctl.VHOST_GET_VRING_BASE, "II", 1, 0), ENOBUFS),
    ("an unknown request, queue 0", lambda raw: raw.own().ioctl(0x4008AFEE, "II", 0, 0), ENOTTY),
    ("an unknown request, queue 9", lambda raw: raw.own().ioctl(0x4008AFEE, "II", 9, 0), ENOBUFS),
    ("an unknown request without argument", lambda raw: raw.own().ioctl(0xAFEE), EFAULT),
    ("SET_VRING_NUM 0", lambda raw: raw.own().ioctl(Ioctl.VHOST_SET_VRING_NUM, "II", 0, 0), EINVAL),
    ("SET_VRING_NUM 3", lambda raw: raw.own().ioctl(Ioctl.VHOST_SET_VRING_NUM, "II", 0, 3), EINVAL),
    (
        "SET_VRING_NUM 512, above the maximum",
        lambda raw: raw.own().ioctl(Ioctl.VHOST_SET_VRING_NUM, "II", 0, 512),
        since((6, 9), EINVAL, before=(0, 512)),
    ),
    ("SET_FEATURES without bit 33", lambda raw: raw.own().ioctl(Ioctl.VHOST_SET_FEATURES, "Q", 1 << 32), EINVAL),
    (
        "SET_FEATURES after FEATURES_OK",
        lambda raw: raw.negotiate().ioctl(Ioctl.VHOST_SET_FEATURES, "Q", PLATFORM),
        EBUSY,
    ),
    ("SET_STATUS that clears a bit", lambda raw: raw.negotiate().status(3), EINVAL),
    ("SET_BACKEND_FEATURES bit 9", lambda raw: raw.own().ioctl(backend, "Q", 1 << 9), EOPNOTSUPP),
    ("SET_BACKEND_FEATURES DESC_ASID and ASID", lambda raw: raw.own().ioctl(backend, "Q", 1 << 7 | 1 << 3), EOPNOTSUPP),
    (
        "SET_BACKEND_FEATURES DESC_ASID alone",
        lambda raw: raw.own().ioctl(backend, "Q", 1 << 7),
        since((6, 7), EINVAL, before=EOPNOTSUPP),
    ),
    (
        "GET_BACKEND_FEATURES",
        lambda raw: raw.ioctl(Ioctl.VHOST_GET_BACKEND_FEATURES, "Q", 0),
        since((6, 7), (0x17E,), before=(0x1E,)),
    ),
    (
        "SET_VRING_ADDR while running",
        lambda raw: raw.run().address(),
        since((6, 8), EINVAL, before=(0, 0, 0x1000, 0x3000, 0x2000, 0)),
    ),
    (
        "SET_VRING_BASE while running",
        lambda raw: raw.run().ioctl(Ioctl.VHOST_SET_VRING_BASE, "II", 0, 1),
        since((6, 8), EINVAL, before=(0, 1)),
    ),
    ("SET_VRING_ADDR while suspended", lambda raw: raw.suspend().address(), (0, 0, 0x1000, 0x3000, 0x2000, 0)),
    ("SET_VRING_BASE while suspended", lambda raw: raw.suspend().ioctl(Ioctl.VHOST_SET_VRING_BASE, "II", 0, 1), (0, 1)),
    ("SET_VRING_BASE 0x10000", lambda raw: raw.own().ioctl(Ioctl.VHOST_SET_VRING_BASE, "II", 0, 0x10000), EINVAL),
    ("SET_VRING_ADDR, odd avail", lambda raw: raw.own().address(avail=0x2001), EINVAL),
    ("SET_VRING_ADDR, flag 2", lambda raw: raw.own().address(flags=2), EOPNOTSUPP),
    ("SET_GROUP_ASID group 0 asid 1", lambda raw: raw.own().ioctl(group, "II", 0, 1), EINVAL),
    ("SET_GROUP_ASID group 1", lambda raw: raw.own().ioctl(group, "II", 1, 0), ENOBUFS),
    (
        "SET_GROUP_ASID while running",
        lambda raw: raw.run().ioctl(group, "II", 0, 0),
        since((7, 0), EBUSY, before=(0, 0)),
    ),
    (
        "GET_VRING_SIZE",
        lambda raw: raw.own().ioctl(Ioctl.VHOST_VDPA_GET_VRING_SIZE, "II", 0, 0),
        since((6, 9), EOPNOTSUPP, before=ENOTTY),
    ),
    (
        "GET_VRING_DESC_GROUP",
        lambda raw: raw.own().ioctl(Ioctl.VHOST_VDPA_GET_VRING_DESC_GROUP, "II", 0, 0),
        since((6, 7), EOPNOTSUPP, before=ENOTTY),
    ),
    ("GET_VRING_GROUP", lambda raw: raw.own().ioctl(Ioctl.VHOST_VDPA_GET_VRING_GROUP, "II", 0, 7), (0, 0)),
    ("GET_CONFIG of no bytes", lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_GET_CONFIG, "IIQ", 0, 0, 0), EINVAL),
    ("GET_CONFIG past the end", lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_GET_CONFIG, "IIQ", 97, 1, 0), EINVAL),
    ("GET_CONFIG across the end", lambda raw: raw.ioctl(Ioctl.VHOST_VDPA_GET_CONFIG, "IIQ", 90, 8, 0), EINVAL),
    ("SET_VRING_KICK with a file", kick_with(lambda raw: raw.file), EINVAL),
    ("SET_VRING_KICK with a bad descriptor", kick_with(lambda _raw: 999), EBADF),
    ("doorbell", lambda raw: mmap.mmap(raw.own().fd, mmap.PAGESIZE, prot=mmap.PROT_WRITE, offset=0), ENOTSUPP),
    ("UPDATE of size 0", with_memory(lambda raw, address: raw.own().iotlb(UPDATE, size=0, address=address)), EINVAL),
    (
        "a message of 39 bytes",
        with_memory(lambda raw, address: os.write(raw.own().fd, update_of(address)[:39])),
        EINVAL,
    ),
    (
        "UPDATE of a hole at the end of the address space",
        lambda raw: raw.own().iotlb(UPDATE, address=(1 << 64) - 0x20000),
        EFAULT,
    ),
    ("a message of type 9", lambda raw: raw.own().iotlb(UPDATE, header=9), EINVAL),
    ("an unknown message", lambda raw: raw.own().iotlb(9), EFAULT),
    ("UPDATE over another", with_memory(overlap), EFAULT),
    ("UPDATE in address space 1", with_memory(foreign_address_space), EFAULT),
    ("UPDATE of private memory", private_update, (72,)),
    (
        "UPDATE of the same range after private memory",
        with_memory(private_then_shared_update),
        EFAULT if PINS else (72,),
    ),
    ("INVALIDATE before any UPDATE", lambda raw: raw.own().iotlb(INVALIDATE), EFAULT),
    ("INVALIDATE of an unmapped range", with_memory(invalidate_unmapped_range), (72,)),
    ("a message of 40 bytes", with_memory(short_update), (72,)),
    ("SUSPEND before DRIVER_OK", lambda raw: raw.negotiate().ioctl(Ioctl.VHOST_VDPA_SUSPEND), ()),
    (
        "RESUME before DRIVER_OK",
        lambda raw: raw.negotiate().ioctl(Ioctl.VHOST_VDPA_RESUME),
        since((6, 3), (), before=EFAULT),
    ),
    ("SUSPEND twice", lambda raw: raw.suspend().ioctl(Ioctl.VHOST_VDPA_SUSPEND), ()),
    ("RESUME twice", resume_twice, since((6, 3), (), before=EFAULT)),
    ("SET_LOG_BASE", lambda raw: raw.own().ioctl(Ioctl.VHOST_SET_LOG_BASE, "Q", 0), ENOTTY),
]


@pytest.mark.parametrize(("action", "outcome"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_kernel_answers(block_node, action, outcome):
    raw = Raw(block_node)
    try:
        if isinstance(outcome, int):
            with pytest.raises(OSError, match=r"") as caught:
                action(raw)
            assert caught.value.errno == outcome
        else:
            assert (action(raw) or ()) == outcome
    finally:
        raw.close()
