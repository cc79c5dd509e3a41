"""Suspend a vDPA device under work, look where its queue stands, and let it resume.

    python3 suspend_vdpa.py vdpa:blk0

Needs root, and a disk that is bound to vhost_vdpa:
'vdpabridge add blk0 --mgmtdev vdpasim_blk --driver vhost_vdpa'. Any other disk will do: sim:blk needs neither.
"""

import sys

import vdpabridge
from vdpabridge.guest.block import BlockDriver, KnownDisk
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue


def main(name: str) -> None:
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 64) as queue, vdpabridge.open(name) as device:
        device.accept_features(1 << vdpabridge.VIRTIO_F_VERSION_1)
        device.map([memory.region])
        queue.attach(device, 0)
        device.start()

        driver = BlockDriver(memory, queue)
        disk = KnownDisk(driver)
        for block in range(8):
            disk.write(block)
        queue.kick()
        disk.settle(driver.drain())
        for block in range(8, 16):
            disk.write(block)
        queue.kick()

        # what the device has taken of the last eight it does before; the others it will find when it resumes
        device.suspend()
        print(f"{device.state.value}, queue 0 at {device.get_base(0).avail_index}")
        by = vdpabridge.resume(device)
        print(f"{device.state.value}, by {'RESUME' if by else 'a reset and replay: the device has no RESUME'}")
        print(f"{disk.verify()} blocks read back as they were written")


if __name__ == "__main__":
    main(*sys.argv[1:])
