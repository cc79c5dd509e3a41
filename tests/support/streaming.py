"""``python3 -m tests.support.streaming save|load FD``: one procedure for the device behind socket FD, and what it took.

An image goes to standard output or comes from standard input. Prints on standard error, in KiB, the most memory that
was used before and after.
"""

import json
import sys

from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.procedures import load, save
from vdpabridge.state.transfer.channel import Limits
from vdpabridge.vhost_user.connection import Connection


def peak_kib():
    """Of this program: unlike getrusage's, it does not begin with what the parent had."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main():
    what, fd = sys.argv[1], int(sys.argv[2])
    with VhostUser(Connection.from_fd(fd), device_id=26, timeout_s=120) as device:
        before = peak_kib()
        if what == "save":
            device.accept_features(1 << 32)
            report = save(device, sys.stdout.fileno(), Limits(Deadline(120)))
        else:
            report = load(device, sys.stdin.fileno(), Limits(Deadline(120)), {})
        facts = {"before": before, "after": peak_kib(), "state_bytes": report.state_bytes}
        print(json.dumps(facts), file=sys.stderr)


if __name__ == "__main__":
    main()
