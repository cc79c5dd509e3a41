"""Ask a 'vdpabridge serve --control' what its device does, and have it saved.

    vdpabridge serve sim:fs --socket-path fs.sock --control fs.control &
    python3 control_socket.py fs.control image

The protocol is JSON-RPC 2.0, one message a line: see vdpabridge/control/PROTOCOL.md.
"""

import os
import sys

import vdpabridge


def main(control: str, image: str) -> None:
    with vdpabridge.ControlClient(control, timeout_s=30) as client:
        status = client.ask("status")
        print(f"{status['device']} is {status['state']}")
        try:
            # the process writes the file, and its working directory is not ours
            saved = client.ask("save", path=os.path.abspath(image))
        except vdpabridge.ControlError as error:
            sys.exit(f"not saved: {error}")
        print(f"saved {saved['state_bytes']} bytes of device state into {image}")


if __name__ == "__main__":
    main(*sys.argv[1:])
