"""The commands about the vDPA bus: ask the packages beside, print."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from ..bus.bus import Bus, BusDevice
from ..errors import VdpaBridgeError
from .output import print_json, print_records, print_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.netlink import VdpaNetlink

__all__ = ["add", "bind", "delete", "list", "show"]


def list(arguments: argparse.Namespace) -> None:  # the subcommand's name
    """``vdpabridge list``: sysfs only."""
    devices = Bus().devices()
    if arguments.json:
        print_json("dev", {device.name: _place(device) for device in devices}, pretty=arguments.pretty)
    else:
        rows = [(device.name, device.driver or "-", device.node or "-") for device in devices]
        print_table(("NAME", "DRIVER", "NODE"), rows)


def show(arguments: argparse.Namespace) -> None:
    """``vdpabridge show``: netlink, sysfs, and who has the node open. Nothing is opened: that would reset a device."""
    if arguments.mgmtdev:
        section, records = "mgmtdev", _management_devices()
    else:
        section, records = "dev", _devices(arguments.device)
    if arguments.json:
        print_json(section, records, pretty=arguments.pretty)
    else:
        print_records(records)


def add(arguments: argparse.Namespace) -> None:
    """``vdpabridge add``."""
    netlink_class = _netlink()

    bus = Bus()
    with netlink_class() as netlink:
        netlink.add(arguments.device, arguments.mgmtdev, mac=arguments.mac, mtu=arguments.mtu)
        if arguments.driver:
            try:
                bus.bind(arguments.device, arguments.driver)
            except VdpaBridgeError:
                netlink.delete(arguments.device)
                raise
    _print_place(bus.device(arguments.device), arguments)


def delete(arguments: argparse.Namespace) -> None:
    """``vdpabridge del``."""
    netlink_class = _netlink()

    bus = Bus()
    name = bus.device(arguments.device).name
    bus.check_idle(name, "delete", force=arguments.force)
    with netlink_class() as netlink:
        netlink.delete(name)


def bind(arguments: argparse.Namespace) -> None:
    """``vdpabridge bind``."""
    bus = Bus()
    device = bus.bind(bus.device(arguments.device).name, arguments.driver, force=arguments.force)
    _print_place(device, arguments)


def _netlink() -> type[VdpaNetlink]:
    """`VdpaNetlink`, without most of pyroute2, whose ``__init__`` imports everything that it has.

    In its place is a package that is empty, for as long as this process lives: only a command may do that, which has
    one thread and imports nothing else of pyroute2.
    """
    import importlib.util  # here, because 'list' does not need it

    spec = importlib.util.find_spec("pyroute2")
    if spec is not None and spec.submodule_search_locations is not None:
        package = ModuleType("pyroute2")
        package.__path__ = [*spec.submodule_search_locations]
        package.__spec__ = spec
        sys.modules.setdefault("pyroute2", package)
    from ..bus.netlink import VdpaNetlink

    return VdpaNetlink


def _place(device: BusDevice) -> dict[str, object]:
    return {"driver": device.driver, "path": device.node}


def _print_place(device: BusDevice, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json("dev", {device.name: _place(device)}, pretty=arguments.pretty)
    else:
        print_records({device.name: _place(device)})


def _devices(wanted: str | None) -> dict[str, dict[str, object]]:
    from ..abi.virtio import device_name

    netlink_class = _netlink()
    from ..linux.holders import holders

    bus = Bus()
    places = [bus.device(wanted)] if wanted else bus.devices()
    with netlink_class() as netlink:
        known = {device.name: device for device in netlink.devices()}
    records: dict[str, dict[str, object]] = {}
    for place in places:
        record: dict[str, object] = {}
        if device := known.get(place.name):
            record |= {
                "type": device_name(device.device_id),
                "mgmtdev": device.management_device,
                "vendor_id": device.vendor_id,
                "max_vqs": device.max_queues,
                "max_vq_size": device.max_queue_size,
                "device_id": device.device_id,
            }
        record |= _place(place)
        if place.node and (who := holders(place.node)):
            record["held_by"] = [str(holder) for holder in who]
        records[place.name] = record
    return records


def _management_devices() -> dict[str, dict[str, object]]:
    from ..abi.features import feature_names
    from ..abi.virtio import CLASS_NAMES

    netlink_class = _netlink()

    with netlink_class() as netlink:
        return {
            parent.handle: {
                "supported_classes": [CLASS_NAMES.get(device_id, f"id-{device_id}") for device_id in parent.classes],
                "max_supported_vqs": parent.max_queues,
                "dev_features": feature_names(parent.features, parent.classes[0] if len(parent.classes) == 1 else None),
            }
            for parent in netlink.management_devices()
        }
