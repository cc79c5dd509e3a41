"""What is in an image, in words and numbers that people and programs can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...abi.configurations import CONFIGURATIONS
from ...abi.features import feature_names
from ...abi.virtio import VIRTIO_ID_FS, device_name
from ...device import PackedBase, QueueBase
from ..snapshot import QueueSnapshot
from .reader import ImageReader
from .writer import ImageFacts

__all__ = ["Description", "describe", "differences", "identify"]

_PASST_MAGIC = bytes.fromhex("b1bb1d1b0bb1d1b0")
#: Enough to tell the format of the state.
_FIRST_BYTES = 16

#: A nested JSON object.
Description = dict[str, Any]


def describe(reader: ImageReader) -> Description:
    """Describe the image of ``reader``, whose state was not read yet; reads it to its end. Raises `ImageError`."""
    first = b""
    size = 0
    for piece in reader.state():
        if not size:
            first = piece[:_FIRST_BYTES]
        size += len(piece)
    described = _facts(reader.facts)
    if reader.facts.has_state:
        kind = identify(first, reader.facts.snapshot.device_id)
        described["state"] = {"size_bytes": size, "first_bytes": first.hex(), "format": kind}
    described["digest"] = reader.digest.hex()
    return described


def identify(first: bytes, device_id: int | None) -> str:
    """The format of device state that begins with ``first``; a guess, since only some have a magic number."""
    if first.startswith(b"vdpa-sim"):
        return f"vdpabridge's simulator, version {int.from_bytes(first[8:12], 'little')}"
    if first.startswith(_PASST_MAGIC):
        return f"passt, version {int.from_bytes(first[8:12], 'big')}"
    if device_id == VIRTIO_ID_FS and first[:1] in (b"\0", b"\1"):
        return f"virtiofsd, version {first[0] + 1}"
    return "not known" if first else "empty"


def differences(before: Description, after: Description) -> list[tuple[str, Any, Any]]:
    """(what, before, after) of each entry that differs; None for an entry that is missing."""
    old, new = _flat(before), _flat(after)
    names = [*old, *(name for name in new if name not in old)]
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _facts(facts: ImageFacts) -> Description:
    snapshot = facts.snapshot
    device_id = snapshot.device_id
    described: Description = {
        "device": None if device_id is None else device_name(device_id),
        "device_id": device_id,
        "queue_count": facts.queue_count,
        "queue_size_max": facts.queue_size_max,
        "started": snapshot.started,
        "features": feature_names(snapshot.features, device_id),
    }
    if facts.offered_features is not None:
        described["features_not_accepted"] = feature_names(facts.offered_features & ~snapshot.features, device_id)
    described["queues"] = {str(index): _queue(queue) for index, queue in sorted(snapshot.queues.items())}
    if snapshot.config:
        described["config"] = _config(snapshot.config, device_id)
    return described


def _queue(queue: QueueSnapshot) -> Description:
    setup = queue.setup
    places = {"desc": setup.desc_address, "driver": setup.avail_address, "device": setup.used_address}
    return {"size": setup.size, "enabled": queue.enabled, **_position(queue.base)} | {
        name: hex(address) for name, address in places.items()
    }


def _position(base: QueueBase) -> Description:
    if isinstance(base, PackedBase):
        wraps = {"avail_wrap": int(base.avail_wrap), "used_wrap": int(base.used_wrap)}
        return {"avail_index": base.avail_index, "used_index": base.used_index, **wraps}
    return {"avail_index": base.avail_index}


def _config(config: bytes, device_id: int | None) -> Description:
    """The fields that are not 0; the bytes if the structure is not known."""
    layout = CONFIGURATIONS.get(device_id or 0)
    if layout is None:
        return {"bytes": config.hex()}
    return {name: _plain(value) for name, value in layout.decode(config).items() if value and _plain(value)}


def _plain(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    text = value.rstrip(b"\0")
    return text.decode() if text.isascii() and text.decode().isprintable() else text.hex()


def _flat(described: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in described.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
