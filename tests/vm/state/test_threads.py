"""Everybody asks at once: random requests from many threads, and descriptors closed at any moment."""

import os
import random
import threading
import time
from contextlib import suppress
from errno import EBADF, EBADMSG, EBUSY, ECANCELED, EINVAL, ENODATA, EPIPE

import pytest

from vdpabridge.abi.vhost import VhostIoctl as Ioctl

from ..raw import CANCEL, LIVE, LOAD, SAVE, raw

THREADS = 6
#: What the rules allow for one of the requests at some moment.
ALLOWED = {EBADF, EBADMSG, EBUSY, ECANCELED, EINVAL, ENODATA, EPIPE}


class Crowd:
    """Threads that ask ``device``, each by its own dice."""

    def __init__(self, device, seed, rounds):
        self.device = device
        self.state = device.save()
        self.rounds = rounds
        self.lock = threading.Lock()
        self.open = []
        self.problems = []
        dice = random.Random(seed)
        self.threads = [threading.Thread(target=self.run, args=[random.Random(dice.random())]) for _ in range(THREADS)]

    def run(self, dice):
        acts = [self.begin] * 4 + [self.use] * 6 + [self.close] * 3 + [self.device.check] * 3
        acts += [lambda _dice: self.device.begin(CANCEL)] + [self.control] * 2
        for _ in range(self.rounds):
            act = dice.choice(acts)
            try:
                act() if act == self.device.check else act(dice)
            except OSError as error:
                if error.errno not in ALLOWED:
                    self.problems.append(error)
            except Exception as error:
                self.problems.append(error)

    def begin(self, dice):
        fd = self.device.begin(dice.choice([SAVE, LOAD]))
        with self.lock:
            self.open.append(fd)

    def use(self, dice):
        with self.lock:
            # a descriptor of one's own: another thread may close the first at any moment
            fd = os.dup(dice.choice(self.open)) if self.open else -1
        if fd >= 0:
            try:
                os.read(fd, dice.randrange(200)) if dice.random() < 0.5 else os.write(fd, self.state)
            finally:
                os.close(fd)

    def close(self, dice):
        with self.lock:
            if self.open:
                os.close(self.open.pop(dice.randrange(len(self.open))))

    def control(self, dice):
        dice.choice(
            [
                lambda: self.device.ask(Ioctl.VHOST_VDPA_SUSPEND),
                lambda: self.device.ask(Ioctl.VHOST_VDPA_RESUME),
                lambda: self.device.status(0),
                self.device.negotiate,
                lambda: self.device.status(LIVE),
            ]
        )()

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        for thread in self.threads:
            thread.join()
        for fd in self.open:
            os.close(fd)


@pytest.mark.parametrize("seed", range(10))
def test_a_crowd(nodes, seed):
    descriptors = len(os.listdir("/proc/self/fd"))
    with raw(nodes[0]) as device:
        fresh = device.save()
        with Crowd(device, seed, 150) as crowd:
            pass
        assert crowd.problems == []
        device.begin(CANCEL)
        device.status(0)
        assert device.save() == fresh
        device.load(fresh)
        assert device.check() == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("seed", range(5))
def test_a_device_that_is_closed_in_the_middle(nodes, seed):
    """The node is closed while others read and write its transfers, which outlive it."""
    dice = random.Random(seed)
    for _ in range(20):
        with raw(nodes[0]) as device:
            direction = dice.choice([SAVE, LOAD])
            fd = device.begin(direction)
            stop = threading.Event()

            def use(fd=fd, direction=direction, stop=stop):
                while not stop.is_set():
                    with suppress(OSError):
                        os.read(fd, 3) if direction == SAVE else os.write(fd, b"xyz")

            threads = [threading.Thread(target=use) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(dice.random() / 200)
        stop.set()
        for thread in threads:
            thread.join()
        os.close(fd)
    with raw(nodes[0]) as device:
        assert device.save()
