"""Guest memory and shared mappings."""

import mmap
import os
from errno import EACCES, EINVAL

import pytest

from vdpabridge.guest.memory import GuestMemory
from vdpabridge.linux import _libc_build
from vdpabridge.linux.mappings import SharedMapping, store_barrier


def test_addresses_are_the_guests():
    with GuestMemory(1 << 16, guest_address=0x4000_0000) as memory:
        first = memory.allocate(10)
        second = memory.allocate(10, 4096)
        assert (first, second) == (0x4000_0000, 0x4000_1000)
        memory.slice(second, 3)[:] = b"abc"
        assert os.pread(memory.fileno(), 3, 4096) == b"abc"
        region = memory.region
        assert (region.guest_address, region.size_bytes, region.fd, region.offset) == (
            0x4000_0000,
            1 << 16,
            memory.fileno(),
            0,
        )
        assert repr(memory) == "<GuestMemory 0x40000000: 65536 bytes>"


@pytest.mark.parametrize(("address", "size"), [(0xFFF, 1), (0x1000, 0x1001), (0x2000, 1), (0x1FFF, 2)])
def test_outside(address, size):
    with GuestMemory(0x1000, guest_address=0x1000) as memory, pytest.raises(ValueError, match="are not in"):
        memory.slice(address, size)


def test_full():
    with GuestMemory(4096) as memory:
        memory.allocate(4000)
        with pytest.raises(MemoryError, match="full"):
            memory.allocate(4000)


def test_two_mappings_are_the_same_memory():
    with GuestMemory(8192) as memory, SharedMapping(memory.fileno(), 4096, 4096) as mapping:
        memory.view[4096] = 42
        assert mapping.view[0] == 42
        assert mapping.address % mmap.PAGESIZE == 0
        assert "4096 bytes" in repr(mapping)
    assert repr(mapping) == "<SharedMapping closed: 4096 bytes>"


def test_refusals_keep_errno():
    with GuestMemory(4096) as memory:
        with pytest.raises(OSError, match="mmap of 4096 bytes") as caught:
            SharedMapping(memory.fileno(), 4096, 1)
        assert caught.value.errno == EINVAL
        readonly = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY)
        try:
            with pytest.raises(OSError, match="mmap") as caught:
                SharedMapping(readonly, 4096)
            assert caught.value.errno == EACCES
            SharedMapping(readonly, 4096, protection=mmap.PROT_READ).close()
        finally:
            os.close(readonly)


def test_store_barrier_can_be_called():
    store_barrier()


def test_the_generated_module_is_what_the_generator_writes(tmp_path):
    _libc_build.write(tmp_path / "_libc.py")
    checked_in = _libc_build.Path(_libc_build.__file__).with_name("_libc.py")
    assert (tmp_path / "_libc.py").read_text() == checked_in.read_text()


def test_a_guests_memory_is_not_in_core_dumps():
    with GuestMemory(1 << 20) as memory, open("/proc/self/smaps", encoding="ascii", errors="replace") as smaps:
        area = smaps.read().split(f"\n{memory.mapping.address:08x}-", 1)[1]
        flags = next(line for line in area.splitlines() if line.startswith("VmFlags:"))
    assert "dd" in flags.split()
