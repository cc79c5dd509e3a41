"""``vdpabridge inspect``: what is in a state image, and what differs between two."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ..errors import UsageError, VdpaBridgeError
from ..linux.deadline import Deadline
from ..state.image.description import Description, describe, differences
from ..state.image.opening import open_image
from ..state.image.reader import ImageReader
from ..state.transfer.channel import Limits
from ..state.transfer.stream import reading
from .output import print_table

__all__ = ["inspect"]

_NO_LIMITS = Limits(Deadline(None))


def inspect(arguments: argparse.Namespace) -> int:
    """Print one image, or the differences of two (``--diff``): as diff(1), 1 says that there are some, and 2 that
    this cannot be known."""
    if arguments.diff:
        if len(arguments.images) != 2:
            raise UsageError("inspect", why=f"--diff takes two images, not {len(arguments.images)}")
        try:
            before, after = (_read(path) for path in arguments.images)
        except VdpaBridgeError as error:
            raise UsageError(error.what, device=error.device, why=error.why, hint=error.hint) from error
        return int(_print_differences(before, after, arguments))
    if arguments.json:
        described = {path: _read(path) for path in arguments.images}
        print(json.dumps({"image": described}, indent=4 if arguments.pretty else None))
        return 0
    for path in arguments.images:
        if len(arguments.images) > 1:
            print(f"{path}:")
        print_table(("WHAT", "VALUE"), list(_rows(_read(path))))
    return 0


def _read(path: str) -> Description:
    """The image at ``path``, ``-`` for standard input."""
    fd = open_image(path, _NO_LIMITS)
    try:
        return describe(ImageReader(reading(fd, _NO_LIMITS)))
    except VdpaBridgeError as error:
        raise VdpaBridgeError(error.what, device=path, why=error.why, hint=error.hint) from error
    finally:
        os.close(fd)


def _print_differences(before: Description, after: Description, arguments: argparse.Namespace) -> bool:
    """Returns whether there are some."""
    found = differences(before, after)
    if arguments.json:
        indent = 4 if arguments.pretty else None
        print(json.dumps({"diff": {what: {"before": old, "after": new} for what, old, new in found}}, indent=indent))
    elif found:
        print_table(("WHAT", "BEFORE", "AFTER"), [(what, _text(old), _text(new)) for what, old, new in found])
    return bool(found)


def _rows(described: Description, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in described.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name} ")
        else:
            rows.append((prefix + name, _text(value)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
