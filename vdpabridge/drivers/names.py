"""How people name devices: ``/dev/vhost-vdpa-0``, ``vdpa:NAME``, ``vhost-user:SOCKET``, ``sim:blk``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import UsageError

__all__ = ["DEVICE_HELP", "DEVICE_IDS", "DeviceName", "DeviceNameError"]

DEVICE_HELP = (
    "/dev/vhost-vdpa-N, vdpa:NAME[,uapi=FILE.toml], "
    "vhost-user:SOCKET[,id=N|blk|fs|net][,queues=N][,config-size=BYTES], "
    "sim:blk[,size=BYTES][,file=PATH][,read-only][,queues=N] or sim:fs[,files=N|,dir=FOLDER][,tag=NAME], "
    "or a kind of another package"
)
#: Name -> virtio device id.
DEVICE_IDS = {"net": 1, "blk": 2, "block": 2, "fs": 26}
_UNITS = {"K": 10, "M": 20, "G": 30}
_FLAG = "yes"
SECTOR_BYTES = 512
#: Numeric option -> the least and the greatest value. A vhost-user message has 8 bits for a queue, and room for 256
#: bytes of a configuration space.
_BOUNDS = {
    "size": (SECTOR_BYTES, 1 << 60),
    "queues": (1, 256),
    "files": (0, 100_000),
    "id": (1, 63),
    "config-size": (1, 256),
}


class DeviceNameError(UsageError):
    """A text that does not name a device; nothing was opened."""

    def __init__(self, text: str, why: str) -> None:
        super().__init__("open", device=text, why=why, hint=f"one of {DEVICE_HELP}")


@dataclass(frozen=True, slots=True)
class DeviceName:
    """A device as it was named: ``kind:target,option=value``. A path is of kind ``vhost-vdpa``."""

    text: str
    kind: str
    target: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> DeviceName:
        """Take ``text`` apart. Raises `DeviceNameError` for what does not look like a device's name."""
        if text.startswith("/"):
            return cls(text, "vhost-vdpa", text, {})
        kind, colon, rest = text.partition(":")
        target, *words = rest.split(",")
        if not colon or not kind or not target:
            raise DeviceNameError(text, "that is not the name of a device")
        return cls(text, kind, target, dict(_pair(word) for word in words))

    def allow(self, options: Collection[str]) -> None:
        """Raise `DeviceNameError` unless its options are among ``options``, and within their bounds."""
        for option in self.options:
            if option not in options:
                raise DeviceNameError(self.text, f"it has no option {option!r}")
            self._check(option)

    def _check(self, option: str) -> None:
        if option == "id" and self.options[option] in DEVICE_IDS:
            return
        if option in _BOUNDS:
            least, most = _BOUNDS[option]
            if not least <= self.integer(option, 0) <= most:
                raise DeviceNameError(self.text, f"{option} is at least {least} and at most {most}")
        if option == "size" and self.integer(option, 0) % SECTOR_BYTES:
            raise DeviceNameError(self.text, f"a disk's size is a multiple of {SECTOR_BYTES} bytes")

    def integer(self, option: str, default: int) -> int:
        """The value of a numeric option; K, M and G are powers of 1024."""
        word = self.options.get(option)
        if word is None:
            return default
        try:
            return int(word[:-1]) << _UNITS[word[-1]] if word[-1:] in _UNITS else int(word)
        except ValueError:
            raise DeviceNameError(self.text, f"{option}={word} is not a number") from None

    @property
    def device_id(self) -> int | None:
        """The virtio device id that the option ``id`` gives, or None."""
        word = self.options.get("id")
        return DEVICE_IDS[word] if word in DEVICE_IDS else self.integer("id", 0) or None


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value or _FLAG
