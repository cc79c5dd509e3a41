"""Serve a simulated disk to QEMU, as a vhost-user back-end, until Ctrl-C.

    python3 serve_disk.py disk.sock

    qemu-system-x86_64 -m 512M -object memory-backend-memfd,id=ram,size=512M,share=on -machine q35,memory-backend=ram \
        -chardev socket,id=disk,path=disk.sock -device vhost-user-blk-pci,chardev=disk ...

Any device can be served so: 'vdpabridge serve' does it from the command line, and has a control socket besides.
"""

import signal
import sys

import vdpabridge


def main(path: str) -> None:
    with vdpabridge.open("sim:blk,size=64M") as device, vdpabridge.Server(device, report=print) as server:
        signal.signal(signal.SIGINT, lambda *_: server.stop())
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        with vdpabridge.listen(path) as listener:
            print(f"serving {device.name} on {path}", flush=True)
            server.serve(listener)


if __name__ == "__main__":
    main(*sys.argv[1:])
