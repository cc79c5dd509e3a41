"""From what people type to an open device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from ..device import Device
from ..errors import VdpaBridgeError
from .names import DEVICE_IDS, DeviceName

__all__ = ["device_id_of", "open_device"]


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
        return DEVICE_IDS[name.target]
    if name.kind == "vhost-user":
        return name.device_id
    from ..bus import Bus
    from ..bus.netlink import VdpaNetlink

    place = Bus().device(name.target).name
    with VdpaNetlink() as netlink:
        return next((device.device_id for device in netlink.devices() if device.name == place), None)


def _open_node(name: DeviceName, timeout_s: float | None) -> Device:
    from .vhost_vdpa import VhostVdpa

    return VhostVdpa.open(name.target, timeout_s=timeout_s)


def _open_by_bus_name(name: DeviceName, timeout_s: float | None) -> Device:
    from ..bus import Bus
    from .vhost_vdpa import VhostVdpa

    node = Bus().device(name.target).node
    if node is None:
        why, hint = "it has no node", f"'vdpabridge bind {name.target} vhost_vdpa' gives it one"
        raise VdpaBridgeError("open", device=name.text, why=why, hint=hint)
    return VhostVdpa.open(node, timeout_s=timeout_s)


def _open_vhost_user(name: DeviceName, timeout_s: float | None) -> Device:
    from .vhost_user import VhostUser

    return VhostUser.open(
        name.target,
        device_id=name.device_id,
        queue_count=name.number("queues", 0) or None,
        config_size_bytes=name.number("config-size", 0) or None,
        timeout_s=timeout_s,
    )


def _open_sim(name: DeviceName, timeout_s: float | None) -> Device:
    from .sim import Sim

    if name.target == "fs":
        from .sim.tree import default_tree

        return Sim.fs(default_tree(name.number("files", 10)), tag=name.options.get("tag", ""), timeout_s=timeout_s)
    queue_count = name.number("queues", 1)
    if "file" not in name.options:
        return Sim.blk(name.number("size", 64 << 20), queue_count=queue_count, timeout_s=timeout_s)
    read_only = "read-only" in name.options
    return Sim.blk_file(name.options["file"], read_only=read_only, queue_count=queue_count, timeout_s=timeout_s)


_OPENERS: Mapping[str, Callable[[DeviceName, float | None], Device]] = {
    "vhost-vdpa": _open_node,
    "vdpa": _open_by_bus_name,
    "vhost-user": _open_vhost_user,
    "sim": _open_sim,
}
