"""Simulated devices that keep no dirty log, as vhost-vdpa; also as a driver of another package, for `vdpabridge serve`."""

from pathlib import Path

from vdpabridge.device import Capability
from vdpabridge.drivers.registry import Driver
from vdpabridge.drivers.sim import Sim
from vdpabridge.drivers.vhost_user import VhostUser

from .dirty_log import covering


class Unlogged(Sim):
    """Keeps no log. Notes itself where it writes."""

    lacks = frozenset({Capability.DIRTY_LOG, Capability.INFLIGHT, Capability.SKIP_DRAIN, Capability.QUEUE_CONTROL})

    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        self.pages = set()
        written = self._guest.written

        def note(address, size):
            self.pages |= covering(address, size)
            written(address, size)

        self._guest.written = note

    @property
    def capabilities(self):
        return super().capabilities - self.lacks


class Fixed(Unlogged):
    """As vhost-vdpa: to give it other rings, it has to be reset."""

    lacks = Unlogged.lacks | {Capability.SETUP_WHILE_SUSPENDED}


class Unresumable(Fixed):
    """As vhost-vdpa before Linux 6.3."""

    lacks = Fixed.lacks | {Capability.RESUME}


class UnloggedBackEnd(VhostUser):
    """A process that keeps no log, if one believes this."""

    @property
    def capabilities(self):
        return super().capabilities - Fixed.lacks


def _open(name, timeout_s):
    if name.target == "fs":
        return Fixed.fs(timeout_s=timeout_s)
    if Path(name.target).is_socket():
        return UnloggedBackEnd.open(name.target, device_id=2, timeout_s=timeout_s)
    return Fixed.blk_file(name.target, timeout_s=timeout_s)


#: ``unlogged:FILE``: a disk whose content is that file's, or that is served at that socket. ``unlogged:fs``: a file server.
DRIVER = Driver(lambda name: name.allow(()), _open, lambda name: 26 if name.target == "fs" else 2)


def register(folder):
    """Have Python find `DRIVER` as an installed package's, if ``folder`` is in its path."""
    installed = folder / "unlogged-1.dist-info"
    installed.mkdir(exist_ok=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: unlogged\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[vdpabridge.drivers]\nunlogged = tests.support.unlogged:DRIVER\n")
