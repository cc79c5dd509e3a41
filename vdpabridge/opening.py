"""From what people type to an open device: ``/dev/vhost-vdpa-0``, ``vdpa:NAME``, ``vhost-user:SOCKET``, ``sim:blk``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .device import Device
from .errors import VdpaBridgeError

__all__ = ["DEVICE_HELP", "DeviceName", "device_id_of", "open_device"]

DEVICE_HELP = (
    "/dev/vhost-vdpa-N, vdpa:NAME, vhost-user:SOCKET[,id=N|blk|fs|net][,queues=N][,config-size=BYTES], "
    "sim:blk[,size=BYTES][,file=PATH][,read-only][,queues=N] or sim:fs[,files=N][,tag=NAME]"
)
_IDS = {"net": 1, "blk": 2, "block": 2, "fs": 26}
_UNITS = {"K": 10, "M": 20, "G": 30}
_FLAG = "yes"


@dataclass(frozen=True, slots=True)
class DeviceName:
    """A device as it was named: ``kind:target,option=value``. A path is of kind ``vhost-vdpa``."""

    text: str
    kind: str
    target: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> DeviceName:
        """Take ``text`` apart. Raises `VdpaBridgeError` for what names no device."""
        if text.startswith("/"):
            return cls(text, "vhost-vdpa", text, {})
        kind, colon, rest = text.partition(":")
        target, *words = rest.split(",")
        if not colon or kind not in _OPTIONS or not target or (kind == "sim" and target not in _SIM_OPTIONS):
            raise VdpaBridgeError("open", device=text, why="that is no device", hint=f"one of {DEVICE_HELP}")
        options = dict(_pair(word) for word in words)
        allowed = _SIM_OPTIONS[target] if kind == "sim" else _OPTIONS[kind]
        for name in options:
            if name not in allowed:
                why = f"it has no option {name!r}"
                raise VdpaBridgeError("open", device=text, why=why, hint=f"one of {DEVICE_HELP}")
        return cls(text, kind, target, options)

    def number(self, option: str, default: int) -> int:
        """The value of a numeric option; K, M and G are powers of 1024."""
        word = self.options.get(option)
        if word is None:
            return default
        try:
            return int(word[:-1]) << _UNITS[word[-1]] if word[-1:] in _UNITS else int(word)
        except ValueError:
            raise VdpaBridgeError("open", device=self.text, why=f"{option}={word} is no number") from None


_OPTIONS: Mapping[str, tuple[str, ...]] = {"vdpa": (), "vhost-user": ("id", "queues", "config-size"), "sim": ()}
_SIM_OPTIONS = {"blk": ("size", "file", "read-only", "queues"), "fs": ("files", "tag")}


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value or _FLAG


def open_device(text: str, *, timeout_s: float | None = None) -> Device:
    """The device that ``text`` names, opened; the caller closes it. Raises `VdpaBridgeError`."""
    name = DeviceName.parse(text)
    try:
        return _OPENERS[name.kind](name, timeout_s)
    except VdpaBridgeError:
        raise
    except OSError as error:
        raise VdpaBridgeError("open", device=text, why=os.strerror(error.errno or 0)) from error
    except ValueError as error:
        raise VdpaBridgeError("open", device=text, why=str(error)) from error


def device_id_of(text: str) -> int | None:
    """The virtio device id of what ``text`` names, without opening it; None where that cannot be known."""
    name = DeviceName.parse(text)
    if name.kind == "sim":
        return _IDS[name.target]
    if name.kind == "vhost-user":
        return _device_id(name)
    from .bus import Bus
    from .bus.netlink import VdpaNetlink

    place = Bus().device(name.target).name
    with VdpaNetlink() as netlink:
        return next((device.device_id for device in netlink.devices() if device.name == place), None)


def _open_node(name: DeviceName, timeout_s: float | None) -> Device:
    from .drivers.vhost_vdpa import VhostVdpa

    return VhostVdpa.open(name.target, timeout_s=timeout_s)


def _open_by_bus_name(name: DeviceName, timeout_s: float | None) -> Device:
    from .bus import Bus
    from .drivers.vhost_vdpa import VhostVdpa

    node = Bus().device(name.target).node
    if node is None:
        why, hint = "it has no node", f"'vdpabridge bind {name.target} vhost_vdpa' gives it one"
        raise VdpaBridgeError("open", device=name.text, why=why, hint=hint)
    return VhostVdpa.open(node, timeout_s=timeout_s)


def _open_vhost_user(name: DeviceName, timeout_s: float | None) -> Device:
    from .drivers.vhost_user import VhostUser

    return VhostUser.open(
        name.target,
        device_id=_device_id(name),
        queue_count=name.number("queues", 0) or None,
        config_size_bytes=name.number("config-size", 0) or None,
        timeout_s=timeout_s,
    )


def _open_sim(name: DeviceName, timeout_s: float | None) -> Device:
    from .drivers.sim import Sim

    if name.target == "fs":
        from .drivers.sim.tree import default_tree

        return Sim.fs(default_tree(name.number("files", 10)), tag=name.options.get("tag", ""), timeout_s=timeout_s)
    queue_count = name.number("queues", 1)
    if "file" not in name.options:
        return Sim.blk(name.number("size", 64 << 20), queue_count=queue_count, timeout_s=timeout_s)
    read_only = "read-only" in name.options
    return Sim.blk_file(name.options["file"], read_only=read_only, queue_count=queue_count, timeout_s=timeout_s)


def _device_id(name: DeviceName) -> int | None:
    word = name.options.get("id")
    return _IDS[word] if word in _IDS else name.number("id", 0) or None


_OPENERS: Mapping[str, Callable[[DeviceName, float | None], Device]] = {
    "vhost-vdpa": _open_node,
    "vdpa": _open_by_bus_name,
    "vhost-user": _open_vhost_user,
    "sim": _open_sim,
}
