"""Where the runner's own files are: in a checkout, or installed with the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["INSTALLED", "PROGRAM", "REPOSITORY", "data_folder"]

_HERE = Path(__file__).resolve().parent
#: A wheel has the folders inside the package; a checkout has them beside it.
INSTALLED = (_HERE / "data").is_dir()
#: What the guest gets is below this.
REPOSITORY = _HERE.parent if INSTALLED else _HERE.parent.parent
#: How the user has called us.
PROGRAM = "vdpabridge-vm" if INSTALLED else "vm-images/run"


def data_folder(name: str) -> Path:
    """The runner's folder ``name``: ``guest`` or ``kernel``."""
    return (_HERE / "data" if INSTALLED else _HERE.parent) / name
