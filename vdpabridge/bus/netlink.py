"""The ``vdpa`` netlink family: lists the parents that can make devices, makes devices and deletes them.

pyroute2 is imported when a socket is opened, not before: it takes a quarter of a second. Only what pyroute2 0.7.7
(Debian stable) and 0.9 have in common is used. The family answers in the initial network namespace only.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..abi.vdpa_netlink import VDPA_GENL_NAME, VDPA_GENL_VERSION, VdpaAttribute as Attribute, VdpaCommand as Command
from ..errors import BusError, NoSuchDevice, VdpaBridgeError

__all__ = ["ManagementDevice", "NetlinkDevice", "VdpaNetlink"]


@dataclass(frozen=True, slots=True)
class ManagementDevice:
    """A parent that can make devices. ``handle`` is ``BUS/NAME``, or ``NAME`` without a bus (vdpa_sim, VDUSE)."""

    handle: str
    classes: tuple[int, ...]
    """Virtio device ids that it says it can make; VDUSE also makes fs (26), but does not say so."""
    max_queues: int
    features: int


@dataclass(frozen=True, slots=True)
class NetlinkDevice:
    """A device as its parent describes it."""

    name: str
    management_device: str
    device_id: int
    vendor_id: int
    max_queues: int
    max_queue_size: int
    min_queue_size: int


#: Attribute -> pyroute2's type. Attributes that are not read stay undecoded.
_TYPES = {
    Attribute.VDPA_ATTR_MGMTDEV_BUS_NAME: "asciiz",
    Attribute.VDPA_ATTR_MGMTDEV_DEV_NAME: "asciiz",
    Attribute.VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES: "uint64",
    Attribute.VDPA_ATTR_DEV_NAME: "asciiz",
    Attribute.VDPA_ATTR_DEV_ID: "uint32",
    Attribute.VDPA_ATTR_DEV_VENDOR_ID: "uint32",
    Attribute.VDPA_ATTR_DEV_MAX_VQS: "uint32",
    Attribute.VDPA_ATTR_DEV_MAX_VQ_SIZE: "uint16",
    Attribute.VDPA_ATTR_DEV_MIN_VQ_SIZE: "uint16",
    Attribute.VDPA_ATTR_DEV_NET_CFG_MACADDR: "l2addr",
    Attribute.VDPA_ATTR_DEV_NET_CFG_MAX_VQP: "uint16",
    Attribute.VDPA_ATTR_DEV_NET_CFG_MTU: "uint16",
    Attribute.VDPA_ATTR_DEV_MGMTDEV_MAX_VQS: "uint32",
    Attribute.VDPA_ATTR_DEV_SUPPORTED_FEATURES: "uint64",
    Attribute.VDPA_ATTR_DEV_FEATURES: "uint64",
}

#: (command, errno) -> why, what to do.
_MEANINGS: dict[tuple[Command | None, int], tuple[str, str]] = {
    (None, errno.EPERM): ("no permission", "be root: this needs CAP_NET_ADMIN"),
    (None, errno.EACCES): ("no permission", "be root: this needs CAP_NET_ADMIN"),
    (Command.VDPA_CMD_DEV_NEW, errno.EEXIST): ("a device of that name exists", "choose another name"),
    (Command.VDPA_CMD_DEV_NEW, errno.ENODEV): ("no such management device", "'vdpabridge show --mgmtdev' lists them"),
    (Command.VDPA_CMD_DEV_NEW, errno.EINVAL): (
        "the parent refused it",
        "VDUSE: its daemon must have set the device up first; others: an attribute or feature does not fit",
    ),
    (Command.VDPA_CMD_DEV_NEW, errno.ENOSPC): ("the parent can make no more devices", "delete one"),
    (Command.VDPA_CMD_DEV_NEW, errno.EOPNOTSUPP): ("the parent does not know one of the attributes", "leave it out"),
    (Command.VDPA_CMD_DEV_DEL, errno.ENODEV): ("no such device", "'vdpabridge list' shows the devices"),
    (Command.VDPA_CMD_DEV_DEL, errno.EINVAL): ("it was not made by a management device", "its parent's driver owns it"),
}


class VdpaNetlink:
    """A connection to the family. Raises `NoSuchDevice` if the kernel has no such family. One thread at a time."""

    def __init__(self) -> None:
        self._socket, self._message = _connect()

    def management_devices(self) -> list[ManagementDevice]:
        """The parents, by handle."""
        replies = self._request(Command.VDPA_CMD_MGMTDEV_GET, {}, dump=True)
        return sorted((_management_device(reply) for reply in replies), key=lambda parent: parent.handle)

    def devices(self) -> list[NetlinkDevice]:
        """The devices that a management device made, by name."""
        replies = self._request(Command.VDPA_CMD_DEV_GET, {}, dump=True)
        return sorted((_device(reply) for reply in replies), key=lambda device: device.name)

    def add(self, name: str, management_device: str, *, mac: str | None = None, mtu: int | None = None) -> None:
        """Make device ``name`` (``mac`` and ``mtu``: of net). Raises `BusError`; `VdpaBridgeError` for bad values."""
        _check_values(name, mac, mtu)
        bus, _, parent = management_device.rpartition("/")
        attributes: dict[Attribute, object] = {
            Attribute.VDPA_ATTR_DEV_NAME: name,
            Attribute.VDPA_ATTR_MGMTDEV_DEV_NAME: parent,
        }
        optional = {
            Attribute.VDPA_ATTR_MGMTDEV_BUS_NAME: bus or None,
            Attribute.VDPA_ATTR_DEV_NET_CFG_MACADDR: mac,
            Attribute.VDPA_ATTR_DEV_NET_CFG_MTU: mtu,
        }
        attributes |= {attribute: value for attribute, value in optional.items() if value is not None}
        self._request(Command.VDPA_CMD_DEV_NEW, attributes, device=name)

    def delete(self, name: str) -> None:
        """Delete device ``name``. Blocks, as does every vDPA request, while its node is open: see `Bus.check_idle`."""
        self._request(Command.VDPA_CMD_DEV_DEL, {Attribute.VDPA_ATTR_DEV_NAME: name}, device=name)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(
        self, command: Command, attributes: Mapping[Attribute, object], *, dump: bool = False, device: str = ""
    ) -> list[Any]:
        from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST
        from pyroute2.netlink.exceptions import NetlinkError

        message = self._message()
        message["cmd"] = int(command)
        message["version"] = VDPA_GENL_VERSION
        message["attrs"] = [(attribute.name, value) for attribute, value in attributes.items()]
        flags = NLM_F_REQUEST | (NLM_F_DUMP if dump else NLM_F_ACK)
        try:
            return list(self._socket.nlm_request(message, msg_type=self._socket.prid, msg_flags=flags))
        except NetlinkError as error:
            why, hint = _MEANINGS.get((command, error.code)) or _MEANINGS.get((None, error.code)) or ("", "")
            raise BusError(error.code, command.name, device=device, why=why, hint=hint) from None


def _check_values(name: str, mac: str | None, mtu: int | None) -> None:
    """Raise `VdpaBridgeError` for values that the kernel would silently misread, or that pyroute2 fails on."""
    what = "make a device"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,63}", name) or name in (".", ".."):
        why = "a device's name is made of letters, digits, '.', '_' and '-', up to 63"
        raise VdpaBridgeError(what, device=name or "''", why=why)
    if mac is not None and not re.fullmatch(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", mac):
        raise VdpaBridgeError(what, device=name, why=f"{mac!r} is not a MAC address", hint="like 52:54:00:12:34:56")
    if mtu is not None and not 68 <= mtu <= 65535:
        raise VdpaBridgeError(what, device=name, why=f"an MTU is 68 to 65535, not {mtu}")


def _connect() -> tuple[Any, Any]:
    from pyroute2.netlink import genlmsg
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic import GenericNetlinkSocket

    class VdpaMessage(genlmsg):  # type: ignore[misc]  # pyroute2 has no types
        prefix = "VDPA_ATTR_"
        nla_map = tuple((attribute.name, _TYPES.get(attribute, "hex")) for attribute in Attribute)

    connection = GenericNetlinkSocket()
    try:
        connection.bind(VDPA_GENL_NAME, VdpaMessage)
    except NetlinkError:
        connection.close()
        hint = "'modprobe vdpa' loads it; it answers in the initial network namespace only"
        raise NoSuchDevice("vDPA netlink", why="this kernel has none loaded", hint=hint) from None
    return connection, VdpaMessage


def _management_handle(reply: Any) -> str:
    bus = reply.get_attr(Attribute.VDPA_ATTR_MGMTDEV_BUS_NAME.name)
    name = reply.get_attr(Attribute.VDPA_ATTR_MGMTDEV_DEV_NAME.name) or ""
    return f"{bus}/{name}" if bus else name


def _management_device(reply: Any) -> ManagementDevice:
    classes = reply.get_attr(Attribute.VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES.name) or 0
    return ManagementDevice(
        _management_handle(reply),
        tuple(bit for bit in range(64) if classes >> bit & 1),
        reply.get_attr(Attribute.VDPA_ATTR_DEV_MGMTDEV_MAX_VQS.name) or 0,
        reply.get_attr(Attribute.VDPA_ATTR_DEV_SUPPORTED_FEATURES.name) or 0,
    )


def _device(reply: Any) -> NetlinkDevice:
    def integer(attribute: Attribute) -> int:
        return int(reply.get_attr(attribute.name) or 0)

    return NetlinkDevice(
        reply.get_attr(Attribute.VDPA_ATTR_DEV_NAME.name) or "",
        _management_handle(reply),
        integer(Attribute.VDPA_ATTR_DEV_ID),
        integer(Attribute.VDPA_ATTR_DEV_VENDOR_ID),
        integer(Attribute.VDPA_ATTR_DEV_MAX_VQS),
        integer(Attribute.VDPA_ATTR_DEV_MAX_VQ_SIZE),
        integer(Attribute.VDPA_ATTR_DEV_MIN_VQ_SIZE),
    )
