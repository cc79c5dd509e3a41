"""Devices behind a vhost-user socket, for example of virtiofsd, passt, SPDK or qemu-storage-daemon."""

from .driver import VhostUser

__all__ = ["VhostUser"]
