"""The udev rules and their helper, however this package was installed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["helper", "rules"]

_PACKAGE = Path(__file__).parent.parent


def rules() -> str:
    """The text of ``60-vdpabridge.rules``."""
    return _read("60-vdpabridge.rules")


def helper() -> str:
    """The text of ``vdpa-node``, the helper that the rules run."""
    return _read("vdpa-node")


def _read(name: str) -> str:
    # the wheel carries the files inside the package; a checkout has them beside it
    installed = _PACKAGE / "udev" / name
    return (installed if installed.exists() else _PACKAGE.parent / "udev" / name).read_text()
