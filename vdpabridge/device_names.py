"""How people name devices: ``/dev/vhost-vdpa-0``, ``vdpa:NAME``, ``vhost-user:SOCKET``, ``sim:blk``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import VdpaBridgeError

__all__ = ["DEVICE_HELP", "DEVICE_IDS", "DeviceName"]

DEVICE_HELP = (
    "/dev/vhost-vdpa-N, vdpa:NAME, vhost-user:SOCKET[,id=N|blk|fs|net][,queues=N][,config-size=BYTES], "
    "sim:blk[,size=BYTES][,file=PATH][,read-only][,queues=N] or sim:fs[,files=N][,tag=NAME]"
)
#: Name -> virtio device id.
DEVICE_IDS = {"net": 1, "blk": 2, "block": 2, "fs": 26}
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

    @property
    def device_id(self) -> int | None:
        """What the option ``id`` says."""
        word = self.options.get("id")
        return DEVICE_IDS[word] if word in DEVICE_IDS else self.number("id", 0) or None


_OPTIONS: Mapping[str, tuple[str, ...]] = {"vdpa": (), "vhost-user": ("id", "queues", "config-size"), "sim": ()}
_SIM_OPTIONS = {"blk": ("size", "file", "read-only", "queues"), "fs": ("files", "tag")}


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value or _FLAG
