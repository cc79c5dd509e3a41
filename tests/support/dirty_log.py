"""A dirty log of a guest in miniature, and what it is compared with: the pages that changed."""

import os

from vdpabridge.device import DirtyLog
from vdpabridge.linux.mappings import memory_file

PAGE = 4096


class Bitmap:
    """A log for all of ``memory``. A context manager."""

    def __init__(self, memory):
        end = memory.region.guest_address + memory.region.size_bytes
        self.size_bytes = end // PAGE // 8
        self.fd = memory_file("log", self.size_bytes)
        self.log = DirtyLog(self.fd, self.size_bytes)

    def pages(self):
        """The pages that are marked."""
        content = os.pread(self.fd, self.size_bytes, 0)
        return {8 * at + bit for at, byte in enumerate(content) if byte for bit in range(8) if byte >> bit & 1}

    def clear(self):
        """Forget all marks."""
        os.pwrite(self.fd, bytes(self.size_bytes), 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)


def covering(address, size):
    """The pages of these bytes."""
    return set(range(address // PAGE, (address + size - 1) // PAGE + 1))


def pages_of(memory):
    """All of them."""
    return covering(memory.region.guest_address, memory.region.size_bytes)


def changed(memory, before, *queues):
    """Pages that differ from ``before``, but for what the guest's drivers of ``queues`` write themselves."""
    own = {
        page
        for queue in queues
        for address, size in queue.setup.parts(packed=False)[:2]
        for page in covering(address, size)
    }
    now, first = bytes(memory.view), memory.region.guest_address // PAGE
    starts = range(0, len(now), PAGE)
    return {first + at // PAGE for at in starts if now[at : at + PAGE] != before[at : at + PAGE]} - own


def used_ring_page(queue):
    """The page with its index."""
    return queue.setup.used_address // PAGE
