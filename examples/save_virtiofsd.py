"""Save what a virtiofsd knows of its guest: mount it, open a file, save, and read on as if nothing had happened.

    virtiofsd --shared-dir DIR --socket-path fs.sock --migration-mode find-paths &
    python3 save_virtiofsd.py vhost-user:fs.sock,id=fs NAME image

NAME is a file in DIR. 'vdpabridge inspect image' shows what was saved. 'sim:fs lines image' needs no virtiofsd.
"""

import sys

import vdpabridge
from vdpabridge.guest.fuse import FuseDriver
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

#: Where the requests go; queue 0 is for those that must not wait.
REQUESTS = 1


def main(name: str, file: str, image: str) -> None:
    with (
        GuestMemory(2 << 20) as memory,
        SplitQueue(memory, 128) as hiprio,
        SplitQueue(memory, 128) as requests,
        vdpabridge.open(name) as device,
    ):
        device.accept_features(1 << vdpabridge.VIRTIO_F_VERSION_1)
        device.map([memory.region])
        hiprio.attach(device, 0)
        requests.attach(device, REQUESTS)
        device.start()

        fuse = FuseDriver(memory, hiprio, requests)
        fuse.init()
        nodeid = fuse.walk(file).nodeid
        handle = fuse.open(nodeid)
        before = fuse.read(nodeid, handle, 0, 16)

        report = vdpabridge.save(device, image)
        print(f"saved {report.state_bytes} bytes of device state; the device is {device.state.value}")
        for step in report.steps:
            print(f"  {step.name}: {(step.end_s - step.begin_s) * 1000:.1f} ms")

        # the handle is from before the save
        print(f"read on: {'the same' if fuse.read(nodeid, handle, 0, 16) == before else 'something else'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
