"""Move a disk from one device to another while requests are under way.

    python3 migrate_disk.py sim:blk,file=disk sim:blk,file=disk
    python3 migrate_disk.py vdpa:blk0 vdpa:blk1

Two vDPA devices have to show the same disk, as those of vdpa_sim_blk do with shared_backend=1.
"""

import sys

import vdpabridge
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue


def main(first: str, second: str) -> None:
    with (
        GuestMemory(1 << 20) as memory,
        SplitQueue(memory, 64) as queue,
        vdpabridge.open(first) as source,
        vdpabridge.open(second) as destination,
    ):
        source.accept_features(1 << vdpabridge.VIRTIO_F_VERSION_1)
        source.map([memory.region])
        queue.attach(source, 0)
        source.start()

        disk = KnownDisk(BlockDriver(memory, queue))
        for block in range(16):
            disk.write(block)
        queue.kick()

        # the guest's memory is all that the two have in common
        destination.map([memory.region])
        try:
            report = vdpabridge.migrate(source, destination)
        except vdpabridge.ProcedureFailed as error:
            sys.exit(f"{error}\nrunning now: {error.running}; what to do: {error.advice.value}")

        # the guest does not know that it is another device: what it kicked before is answered after
        print(f"the source is {source.state.value}, the destination is {destination.state.value}")
        print(f"state moved: {report.state_bytes} bytes, of which the device says that it is whole")
        print(f"{disk.verify()} blocks read back as they were written")


if __name__ == "__main__":
    main(*sys.argv[1:])
