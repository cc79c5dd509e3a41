"""Watch vDPA devices come, go, and change their driver; end after SECONDS without an event.

python3 watch_bus.py 60 &
vdpabridge add blk0 --mgmtdev vdpasim_blk --driver vhost_vdpa
"""

import sys

import vdpabridge


def main(seconds: str) -> None:
    # first the subscription, then the list: so nothing that happens between the two is missed
    with vdpabridge.BusEvents() as events:
        bus = vdpabridge.Bus()
        for device in bus.devices():
            print(f"{device.name}: driver {device.driver or '-'}, node {device.node or '-'}", flush=True)
        while (event := events.next(timeout_s=float(seconds))) is not None:
            print(f"{event.name}: {event.action} {event.driver or ''}".rstrip(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
