"""Devices behind a vhost-user socket: virtiofsd, passt, SPDK, qemu-storage-daemon and the like."""

from .driver import VhostUser

__all__ = ["VhostUser"]
