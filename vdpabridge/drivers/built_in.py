"""The drivers of this package: one row each. A driver is imported when one of its devices is opened."""

from __future__ import annotations

from collections.abc import Mapping

from ..device import Device
from ..errors import VdpaBridgeError
from .names import DEVICE_IDS, DeviceName, DeviceNameError
from .registry import Driver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .sim.tree import Directory

__all__ = ["DRIVERS"]

_SIM_OPTIONS = {"blk": ("size", "file", "read-only", "queues"), "fs": ("files", "tag", "dir")}


def _check_bus(name: DeviceName) -> None:
    name.allow(("uapi",))


def _check_vhost_user(name: DeviceName) -> None:
    name.allow(("id", "queues", "config-size"))


def _check_sim(name: DeviceName) -> None:
    if name.target not in _SIM_OPTIONS:
        raise DeviceNameError(name.text, f"there is no simulated {name.target!r}")
    name.allow(_SIM_OPTIONS[name.target])


def _open_node(name: DeviceName, timeout_s: float | None) -> Device:
    return _open_vhost_vdpa(name.target, name, timeout_s)


def _open_by_bus_name(name: DeviceName, timeout_s: float | None) -> Device:
    from ..bus import Bus

    node = Bus().device(name.target).node
    if node is None:
        why, hint = "it has no node", f"'vdpabridge bind {name.target} vhost_vdpa' gives it one"
        raise VdpaBridgeError("open", device=name.text, why=why, hint=hint)
    return _open_vhost_vdpa(node, name, timeout_s)


def _open_vhost_vdpa(node: str, name: DeviceName, timeout_s: float | None) -> Device:
    from .vhost_vdpa import VhostVdpa
    from .vhost_vdpa.proposal import state_requests

    return VhostVdpa.open(node, timeout_s=timeout_s, state_requests=state_requests(name.options.get("uapi")))


def _open_vhost_user(name: DeviceName, timeout_s: float | None) -> Device:
    from .vhost_user import VhostUser

    return VhostUser.open(
        name.target,
        device_id=name.device_id,
        queue_count=name.integer("queues", 0) or None,
        config_size_bytes=name.integer("config-size", 0) or None,
        timeout_s=timeout_s,
    )


def _open_sim(name: DeviceName, timeout_s: float | None) -> Device:
    from .sim import Sim

    if name.target == "fs":
        return Sim.fs(_tree_of(name), tag=name.options.get("tag", ""), timeout_s=timeout_s)
    queue_count = name.integer("queues", 1)
    if "file" not in name.options:
        return Sim.blk(name.integer("size", 64 << 20), queue_count=queue_count, timeout_s=timeout_s)
    read_only = "read-only" in name.options
    return Sim.blk_file(name.options["file"], read_only=read_only, queue_count=queue_count, timeout_s=timeout_s)


def _tree_of(name: DeviceName) -> Directory:
    from .sim.folder import Folder
    from .sim.tree import default_tree

    if "dir" not in name.options:
        return default_tree(name.integer("files", 10))
    if "files" in name.options:
        raise DeviceNameError(name.text, "files= is for the files in memory, which dir= replaces")
    return Folder(name.options["dir"])


def _device_id_on_bus(name: DeviceName) -> int | None:
    from ..bus import Bus
    from ..bus.netlink import VdpaNetlink

    place = Bus().device(name.target).name
    with VdpaNetlink() as netlink:
        return next((device.device_id for device in netlink.devices() if device.name == place), None)


#: Kind -> its driver.
DRIVERS: Mapping[str, Driver] = {
    "vhost-vdpa": Driver(_check_bus, _open_node, _device_id_on_bus),
    "vdpa": Driver(_check_bus, _open_by_bus_name, _device_id_on_bus),
    "vhost-user": Driver(_check_vhost_user, _open_vhost_user, lambda name: name.device_id),
    "sim": Driver(_check_sim, _open_sim, lambda name: DEVICE_IDS[name.target]),
}
