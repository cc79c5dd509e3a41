"""Devices on the vDPA bus, by sysfs: names, drivers, nodes, binding.

Source: drivers/vdpa/vdpa.c and drivers/vhost/vdpa.c; Documentation/ABI/testing/sysfs-bus-vdpa, which has two names
wrong: the file is ``drivers_probe`` and the driver ``vhost_vdpa``.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from ..errors import BusError, DeviceBusy, DeviceHeld, NoSuchDevice, VdpaBridgeError
from ..linux.holders import holders
from .users import users

__all__ = ["DRIVERS", "Bus", "BusDevice"]

#: The drivers of the bus. With the first, a process uses the device; with the second, this kernel itself.
DRIVERS = ("vhost_vdpa", "virtio_vdpa")

#: How long udev may take to look into a new disk.
_PROBING_S = 2.0
_NO_BUS = "'modprobe vdpa' loads it; also load the module of the device's parent (vdpa_sim_blk, mlx5_vdpa, vduse ...)"


class BusDevice:
    """A device as sysfs shows it.

    ``driver`` is the one it is bound to, or None; ``node`` is ``/dev/vhost-vdpa-N`` if that is vhost_vdpa.
    """

    __slots__ = ("driver", "name", "node")

    def __init__(self, name: str, driver: str | None, node: str | None) -> None:
        self.name = name
        self.driver = driver
        self.node = node

    def __repr__(self) -> str:
        return f"<BusDevice {self.name}: {self.driver or 'no driver'}, {self.node or 'no node'}>"


class Bus:
    """The vDPA bus. ``sys`` and ``dev`` are the folders of sysfs and of the nodes."""

    def __init__(self, sys: str = "/sys", dev: str = "/dev") -> None:
        # plain strings: pathlib would take half of the time of 'vdpabridge list'
        self._bus = f"{sys}/bus/vdpa"
        self._char = f"{sys}/dev/char"
        self._dev = dev

    def devices(self) -> list[BusDevice]:
        """All devices, by name. Raises `NoSuchDevice` if the kernel has no vDPA bus."""
        try:
            names = os.listdir(f"{self._bus}/devices")
        except FileNotFoundError:
            raise NoSuchDevice("vDPA bus", why="this kernel has none loaded", hint=_NO_BUS) from None
        return [self._describe(name) for name in sorted(names)]

    def device(self, name_or_node: str) -> BusDevice:
        """The device called ``name_or_node``, or whose node that path is (or leads to). Raises `NoSuchDevice`."""
        name = self._name_of(name_or_node) if "/" in name_or_node else name_or_node
        if name in ("", ".", "..") or not os.path.exists(f"{self._bus}/devices/{name}"):
            self.devices()  # raises if there is no bus
            raise NoSuchDevice("no such device", device=name, hint="'vdpabridge list' shows the devices")
        return self._describe(name)

    def node(self, name: str) -> str:
        """The node of device ``name``. Raises `NoSuchDevice` if it has none, because it is not bound to vhost_vdpa."""
        device = self.device(name)
        if device.node is None:
            why = f"no node: its driver is {device.driver or 'none'}"
            raise NoSuchDevice(
                "vhost-vdpa", device=name, why=why, hint=f"'vdpabridge bind {name} vhost_vdpa' makes one"
            )
        return device.node

    def bind(self, name: str, driver: str, *, force: bool = False) -> BusDevice:
        """Bind device ``name`` to ``driver``, after unbinding it from the driver that has it.

        Raises `DeviceBusy` if it is in use, unless ``force`` is set; `BusError` if the kernel refuses.
        """
        what = f"bind to {driver}"
        device = self.device(name)
        if device.driver == driver:
            return device
        if not os.path.exists(f"{self._bus}/drivers/{driver}"):
            known = ", ".join(DRIVERS)
            why = "this kernel has no such driver loaded"
            raise VdpaBridgeError(
                what, device=name, why=why, hint=f"the bus's drivers are {known}: 'modprobe {driver}'"
            )
        self.check_idle(name, what, force=force)
        self._rebind(name, device.driver, driver, what)
        bound = self._describe(name)
        if bound.driver == driver:
            return bound
        if device.driver:
            self._rebind(name, bound.driver, device.driver, what)
        why = f"the driver did not take it; it has {self._describe(name).driver or 'no driver'} now"
        raise VdpaBridgeError(what, device=name, why=why, hint="the kernel log may say why")

    def _rebind(self, name: str, old: str | None, new: str, what: str) -> None:
        self._write(name, f"devices/{name}/driver_override", new, what)
        if old:
            self._write(name, f"drivers/{old}/unbind", name, what)
        self._write(name, "drivers_probe", name, what)

    def check_idle(self, name: str, what: str, *, force: bool = False) -> None:
        """Raise `DeviceBusy` if device ``name`` is in use, unless ``force`` is set.

        With vhost_vdpa the kernel waits in vhost_vdpa_remove, uninterruptibly, until the node is closed; a deletion
        waits while it holds the lock of all vDPA netlink requests. With virtio_vdpa nothing waits: the users lose the
        device. This does not open the node to find out: that would reset the device, and wait for a VDUSE daemon that
        may not answer.
        """
        if force:
            return
        node = self._describe(name).node
        if node is not None and (who := holders(node)):
            raise DeviceHeld(name, what, node, who)
        if node is None and (uses := self._lasting_users(name)):
            hint = "end that first; forcing this takes the device away anyway, and data not yet written is lost"
            raise DeviceBusy(what, device=name, why="; ".join(uses), hint=hint)

    def _lasting_users(self, name: str) -> list[str]:
        """The users of device ``name`` that stay: udev opens a new disk only for a moment."""
        end_s = time.monotonic() + _PROBING_S
        while uses := users(f"{self._bus}/devices/{name}", self._dev):
            if time.monotonic() >= end_s:
                break
            time.sleep(0.02)
        return uses

    def _describe(self, name: str) -> BusDevice:
        folder = f"{self._bus}/devices/{name}"
        try:
            driver = os.path.basename(os.readlink(f"{folder}/driver"))
        except OSError:
            driver = None
        try:
            nodes = [entry for entry in os.listdir(folder) if entry.startswith("vhost-vdpa-")]
        except OSError:  # removed meanwhile
            nodes = []
        return BusDevice(name, driver, f"{self._dev}/{nodes[0]}" if nodes else None)

    def _name_of(self, path: str) -> str:
        try:
            status = os.stat(path)
        except OSError as error:
            raise NoSuchDevice("no such node", device=path, why=os.strerror(error.errno or 0)) from None
        if stat.S_ISCHR(status.st_mode):
            target = os.path.realpath(f"{self._char}/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
            if os.path.basename(target).startswith("vhost-vdpa-"):
                return os.path.basename(os.path.dirname(target))
        raise NoSuchDevice("not a vhost-vdpa node", device=path, hint="'vdpabridge list' shows the nodes")

    def _write(self, name: str, file: str, text: str, what: str) -> None:
        path = f"{self._bus}/{file}"
        try:
            with open(path, "wb", buffering=0) as attribute:
                attribute.write(os.fsencode(text))
        except OSError as error:
            hint = "be root" if error.errno in (errno.EACCES, errno.EPERM) else "the kernel log may say why"
            why = f"{os.strerror(error.errno or 0)} ({path})"
            raise BusError(error.errno or 0, what, device=name, why=why, hint=hint) from None
