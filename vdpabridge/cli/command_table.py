"""The commands: one row each. What adds a command's arguments is here too; what it does is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .usage import mode, passed_descriptor, path, seconds

__all__ = ["COMMANDS"]


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", nargs="?", help="a device's name or node (default: all)")
    parser.add_argument("--mgmtdev", action="store_true", help="show the management devices instead")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="its name")
    text = "BUS/NAME or NAME, as 'show --mgmtdev' prints it"
    parser.add_argument("--mgmtdev", required=True, metavar="PARENT", help=text)
    parser.add_argument("--driver", choices=("vhost_vdpa", "virtio_vdpa"), help="what to bind it to afterwards")
    parser.add_argument("--mac", metavar="ADDRESS", help="net: its address")
    parser.add_argument("--mtu", type=int, metavar="BYTES", help="net: its MTU")


def _delete(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="its name or node")
    _force(parser)


def _bind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="its name or node")
    parser.add_argument("driver", help="vhost_vdpa (a process uses it) or virtio_vdpa (this kernel does)")
    _force(parser)


def _force(parser: argparse.ArgumentParser) -> None:
    text = (
        "do it although somebody uses the device. A process that has the node open blocks all vDPA commands on this "
        "machine until it lets go; a mounted disk or a network interface is taken away at once"
    )
    parser.add_argument("--force", action="store_true", help=text)


def _udev_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--helper", action="store_true", help="print the helper that the rules run")


def _service_file(parser: argparse.ArgumentParser) -> None:
    text = "service and socket (templates, one instance a device), sysusers or tmpfiles"
    parser.add_argument("file", choices=("service", "socket", "sysusers", "tmpfiles"), metavar="FILE", help=text)


def _descriptor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("blk", "fs"), help="of the disk or of the file server")
    text = "where the program is (default: where the PATH has it)"
    parser.add_argument("--binary", type=path, metavar="PATH", help=text)


def _guest(parser: argparse.ArgumentParser) -> None:
    from ..drivers.names import DEVICE_HELP

    text = f"a vhost-user socket, or {DEVICE_HELP}"
    parser.add_argument("device", metavar="DEVICE", help=text)
    text = "what to treat it as (default: what its features look like)"
    parser.add_argument("--as", dest="kind", choices=("blk", "fs"), help=text)
    parser.add_argument("--write", action="store_true", help="blk: write, too. This destroys what is on the disk")
    text = "end after so long (default: at Ctrl-C)"
    parser.add_argument("--seconds", type=seconds, metavar="SECONDS", help=text)


def _uapi(parser: argparse.ArgumentParser) -> None:
    text = "a header of a kernel's, for example include/uapi/linux/vhost.h; what it includes is looked for beside it"
    parser.add_argument("header", type=path, metavar="HEADER", help=text)
    parser.add_argument("--diff", type=path, metavar="OTHER", help="what is different in this one")


def _ioctl(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="its name on the vDPA bus, or its node")
    text = (
        "its name, as VHOST_VDPA_GET_STATUS, or its number, as 0x8001af71 or 0xaf7d:16 (16 bytes of argument); behind "
        "it the members of its argument, as index=0. Others follow; the first that fails is the last"
    )
    parser.add_argument("requests", nargs="+", metavar="REQUEST [MEMBER=VALUE ...]", help=text)
    parser.add_argument("--uapi", type=path, metavar="HEADER", help="a kernel's header that defines requests")
    text = "how long each may take (default: 30)"
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", default=30.0, help=text)


def _serve(parser: argparse.ArgumentParser) -> None:
    from ..drivers.names import DEVICE_HELP
    from .log import LEVELS

    parser.add_argument("device", metavar="DEVICE", help=DEVICE_HELP)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", type=path, metavar="PATH", help="listen here; the file is removed at the end")
    text = "a socket that is open: one that listens, or is connected; 'systemd' for the one that systemd has opened"
    where.add_argument("--fd", type=passed_descriptor, metavar="N", help=text)
    text = "who may connect: the permissions of the socket's file, in octal (default: what the umask leaves)"
    parser.add_argument("--socket-mode", type=mode, metavar="MODE", help=text)
    text = "and the group that it belongs to, as 'kvm'"
    parser.add_argument("--socket-group", metavar="GROUP", help=text)
    text = "print what the back-end can do, as JSON, and do nothing else"
    parser.add_argument("--print-capabilities", action="store_true", help=text)
    parser.add_argument("--once", action="store_true", help="end when the first front-end has left")
    text = "a socket for 'vdpabridge status', 'save' and others to ask this process; for this user only"
    parser.add_argument("--control", type=path, metavar="PATH", help=text)
    text = "begin with the device's state in this image; - for standard input"
    parser.add_argument("--restore", type=path, metavar="IMAGE", help=text)
    _accept(parser)
    text = "print every message, and every request to the device, on standard error"
    parser.add_argument("--trace", action="store_true", help=text)
    text = "how urgent what is printed on standard error must be: error, warning, info (the default) or debug"
    parser.add_argument("--log-level", choices=LEVELS, default="info", metavar="LEVEL", help=text)
    text = "bounds every wait for the device or for a front-end in the middle of a message (default: 30)"
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", default=30.0, help=text)


def _control(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("control", type=path, metavar="CONTROL", help="the control socket of 'vdpabridge serve'")
    text = "how long to wait for an answer (default: 300)"
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", default=300.0, help=text)


def _save(parser: argparse.ArgumentParser) -> None:
    _control(parser)
    parser.add_argument("image", type=path, metavar="IMAGE", help="where to; - for standard output")
    parser.add_argument("--stay", action="store_true", help="leave the device suspended afterwards")
    _accept(parser)


def _load(parser: argparse.ArgumentParser) -> None:
    _control(parser)
    parser.add_argument("image", type=path, metavar="IMAGE", help="where from; - for standard input")
    _accept(parser)


def _migrate(parser: argparse.ArgumentParser) -> None:
    _control(parser)
    text = "the control socket of the other 'vdpabridge serve'"
    parser.add_argument("destination", type=path, metavar="DESTINATION", help=text)
    parser.add_argument("--report", type=path, metavar="FILE.svg", help="draw what was done, to scale")
    _accept(parser)


def _resume(parser: argparse.ArgumentParser) -> None:
    _control(parser)
    which = parser.add_mutually_exclusive_group()
    text = "also resume a device whose state was moved to another. The other must not run, now or later"
    which.add_argument("--force", action="store_true", help=text)
    text = "also resume a device that has the state of this move, although nobody has said that it arrived"
    which.add_argument("--move", metavar="NAME", help=text)


def _accept(parser: argparse.ArgumentParser) -> None:
    text = (
        "do it although this is lost: device-state (what the device knows of its guest) or control-queue (what the "
        "guest has set in a network card). For those who can set it again. May be given twice"
    )
    choices = ("device-state", "control-queue")
    parser.add_argument("--accept", action="append", default=[], choices=choices, metavar="LOSS", help=text)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=path, metavar="IMAGE", help="a state image; - for standard input")
    parser.add_argument("--diff", action="store_true", help="show what differs between two images")


def _nothing(_parser: argparse.ArgumentParser) -> None: ...


#: Command -> (module of this package:function, what it does, what adds its arguments).
COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "list": (
        "commands:list",
        "list the devices on the vDPA bus: name, driver, node. Fast: it asks sysfs only",
        _nothing,
    ),
    "show": ("commands:show", "show devices in full, or with --mgmtdev their parents. Disturbs no device", _show),
    "add": ("commands:add", "make a device", _add),
    "del": ("commands:delete", "delete a device. Refused while somebody uses it", _delete),
    "bind": ("commands:bind", "give a device to another driver. Refused while somebody uses it", _bind),
    "serve": ("serve:serve", "be the vhost-user back-end of a device, for QEMU and other front-ends", _serve),
    "demo": ("demo:demo", "show how a device's state goes from one process into another. Needs no root", _nothing),
    "status": ("remote:status", "show the device of a 'serve --control', and what it does", _control),
    "statistics": ("remote:statistics", "show what a 'serve --control' has done since it started", _control),
    "suspend": ("remote:suspend", "suspend the device of a 'serve --control', until 'resume'", _control),
    "resume": ("remote:resume", "resume the device that 'suspend' has suspended", _resume),
    "save": (
        "remote:save",
        "save the device of a 'serve --control' into an image. The device resumes afterwards",
        _save,
    ),
    "load": ("remote:load", "give the device of a 'serve --control' the state in an image", _load),
    "migrate": ("remote:migrate", "move the state of one 'serve --control' into another", _migrate),
    "inspect": ("inspect:inspect", "show what is in a state image: device, features, queues, state", _inspect),
    "guest": (
        "guest:guest",
        "be a guest in miniature: requests whose data is checked, with their rate and the longest pause",
        _guest,
    ),
    "uapi": ("uapi:uapi", "list what a kernel header defines for vhost, or what is different in another", _uapi),
    "ioctl": ("uapi:ioctl", "make any request of vhost-vdpa, by the names in a header. Resets the device", _ioctl),
    "udev-rules": (
        "files:udev_rules",
        "print the udev rules for vhost-vdpa nodes, or the helper that they run",
        _udev_rules,
    ),
    "service-file": (
        "files:service_file",
        "print a file for systemd: the service, its socket, its user or its folders",
        _service_file,
    ),
    "descriptor": (
        "files:descriptor",
        "print the JSON by which management software finds our vhost-user programs",
        _descriptor,
    ),
}
