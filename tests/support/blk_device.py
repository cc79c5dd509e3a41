"""The device's side of a split ring, for tests of the driver's side: a block device in a few lines, with faults on demand."""

import struct

from vdpabridge.guest.virtqueue import SplitQueue

CAPACITY_BYTES = 1 << 20


class BlockDevice:
    """Processes a `SplitQueue`'s requests when told to; ``fault`` bends the next answer."""

    def __init__(self, memory, queue: SplitQueue):
        self.memory, self.queue = memory, queue
        self.disk = bytearray(CAPACITY_BYTES)
        self.last_avail = queue.avail_index
        self.used = queue.used_index
        self.fault = None

    def chain(self, head):
        """The descriptors from ``head`` on: (address, size, writable)."""
        setup = self.queue.setup
        while True:
            address, size, flags, following = struct.unpack(
                "<QIHH", self.memory.slice(setup.desc_address + 16 * head, 16)
            )
            yield address, size, bool(flags & 2)
            if not flags & 1:
                return
            head = following

    def process(self, limit=1 << 16):
        """Do up to ``limit`` requests; returns how many."""
        setup = self.queue.setup
        done = 0
        while done < limit and self.last_avail != struct.unpack("<H", self.memory.slice(setup.avail_address + 2, 2))[0]:
            slot = setup.avail_address + 4 + 2 * (self.last_avail % setup.size)
            head = struct.unpack("<H", self.memory.slice(slot, 2))[0]
            self.last_avail = (self.last_avail + 1) & 0xFFFF
            self.complete(head, self.perform(list(self.chain(head))))
            done += 1
        return done

    def perform(self, chain):
        kind, _, sector = struct.unpack("<IIQ", self.memory.slice(*chain[0][:2]))
        assert [writable for *_, writable in chain] == sorted(writable for *_, writable in chain), "readable first"
        written = 1
        status = 0
        for address, size, writable in chain[1:-1]:
            place = slice(sector * 512, sector * 512 + size)
            if kind == 8:
                self.memory.slice(address, size)[:] = b"in a test".ljust(20, b"\0")
            elif writable:
                self.memory.slice(address, size)[:] = self.disk[place]
            else:
                self.disk[place] = self.memory.slice(address, size)
            written += size if writable else 0
        if self.fault == "status":
            status = 1
        if self.fault == "length":
            written += 1
        if self.fault != "no status":
            self.memory.slice(chain[-1][0], 1)[0] = status
        return written

    def complete(self, head, written):
        setup = self.queue.setup
        entries = {"twice": [head, head], "made up": [(head + 1) % setup.size]}.get(self.fault, [head])
        for each in entries:
            slot = setup.used_address + 4 + 8 * (self.used % setup.size)
            self.memory.slice(slot, 8)[:] = struct.pack("<II", each, written)
            self.used = (self.used + 1) & 0xFFFF
            self.memory.slice(setup.used_address + 2, 2)[:] = struct.pack("<H", self.used)
