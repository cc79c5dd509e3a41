"""Tell what is in a state image, and whether a device would take it, without touching the device's state.

python3 inspect_image.py image sim:blk
"""

import sys

import vdpabridge


def main(image: str, name: str) -> None:
    try:
        facts = vdpabridge.inspect(image)
    except vdpabridge.ImageError as error:
        sys.exit(f"not a whole image: {error}")
    print(f"{facts['device']}, {facts['queue_count']} queues, features {' '.join(facts['features'])}")
    for index, queue in facts["queues"].items():
        print(f"queue {index}: {queue['size']} descriptors, at {queue['avail_index']}")
    if "state" in facts:
        print(f"device state: {facts['state']['size_bytes']} bytes, {facts['state']['format']}")

    with vdpabridge.open(name) as device:
        offered = device.offered_features
    print(f"{name} offers {offered:#x}")


if __name__ == "__main__":
    main(*sys.argv[1:])
