"""A kernel in which something happens to requests that were done."""

import errno
import os
import threading

from .fake_kernel import FakeKernel


class Unlucky(FakeKernel):
    """Does what it is asked, and then something else happens: to each request that is in ``accidents``."""

    def __init__(self, parent=None):
        super().__init__(parent)
        self.accidents = []
        """(name, argument or None for any, what happens)"""

    def ioctl(self, fd, request, argument):
        super().ioctl(fd, request, argument)
        name = self.log[-1]
        for accident in self.accidents:
            wanted, value, happens = accident
            if name == wanted and (value is None or argument[0] == value):
                self.accidents.remove(accident)
                happens()
                return


def interrupted():
    raise KeyboardInterrupt


def refused():
    raise OSError(errno.EIO, os.strerror(errno.EIO))


#: For as long as nobody waits for it any more.
LATE = threading.Event()


def late():
    LATE.wait(0.3)


ACCIDENTS = {"interrupted": interrupted, "refused": refused, "late": late}
