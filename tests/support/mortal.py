"""``python3 -m tests.support.mortal N SOURCE DESTINATION``: `move`, by a process that kills itself at its N-th moment.

A moment is before or after a request of either control socket. Ends with 0 where N was too many.
"""

import itertools
import os
import signal
import sys
import threading

from vdpabridge.control.client import ControlClient
from vdpabridge.control.moving import move


class Mortal(ControlClient):
    moments = itertools.count(1)
    lock = threading.Lock()
    last = 0

    def ask(self, *words, **params):
        self.moment()
        try:
            return super().ask(*words, **params)
        finally:
            self.moment()

    def moment(self):
        with self.lock:
            if next(self.moments) == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def main():
    Mortal.last = int(sys.argv[1])
    with Mortal(sys.argv[2], timeout_s=20) as source, Mortal(sys.argv[3], timeout_s=20) as destination:
        move(source, destination)


if __name__ == "__main__":
    main()
