"""A companion of a server, as the control socket is."""

import os
import threading

from vdpabridge.errors import VdpaBridgeError


class Errands:
    """Has the server's thread do things, as the control socket does."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        self.errand = None
        self.done = threading.Event()

    def fds(self):
        return [self.reader]

    def serve(self, fd):
        os.read(fd, 1)
        try:
            self.outcome = self.errand()
        except VdpaBridgeError as error:
            self.outcome = error
        self.done.set()

    def run(self, errand):
        """What ``errand`` returns or raises."""
        self.done.clear()
        self.errand = errand
        os.write(self.writer, b"x")
        assert self.done.wait(5)
        return self.outcome

    def close(self):
        os.close(self.reader)
        os.close(self.writer)
