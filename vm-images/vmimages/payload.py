"""What the guest gets: the checkout, the agent that runs the command, and modules that Debian stable lacks."""

from __future__ import annotations

import importlib.util
import io
import os
import shlex
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .host import HostError
from .places import INSTALLED, data_folder

__all__ = ["write_payload"]

GUEST = data_folder("guest")
#: The parts of the checkout that the guest gets, below /run/payload/tree. The command runs there too.
CHECKOUT = ("README.md", "pyproject.toml", "vdpabridge", "examples", "tests", "udev", "vm-images")
#: Of an installed package, what is beside it belongs to others.
TREE = ("vdpabridge",) if INSTALLED else CHECKOUT
#: Pure Python modules that the root file system's Debian release has no package for: copied from this interpreter.
MODULES = ("ioctl_opt",)
ENVIRONMENT = {
    "PYTHONPATH": "/run/payload/tree:/run/payload/tree/vm-images:/run/payload/modules",
    "PYTHONDONTWRITEBYTECODE": "1",
    "VDPABRIDGE_IN_VM": "1",
}


def write_payload(
    tar: Path,
    repository: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    extra: Sequence[Path] = (),
    *,
    mark: str = "",
) -> None:
    """Write the tar that the guest's first process unpacks and starts; ``extra`` goes to /run/payload/with.

    The guest writes ``mark`` after all of the output.
    """
    exports = ENVIRONMENT | dict(environment)
    script = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items())
    script += f"exec {shlex.join(command)}\n"
    with tarfile.open(tar, "w") as archive:
        archive.add(GUEST, "guest", filter=_for_guest)
        for name in TREE:
            if (repository / name).exists():
                archive.add(repository / name, f"tree/{name}", filter=_for_guest)
        for path in _distinct(extra):
            # all of it: the user has asked for exactly this
            archive.add(path, f"with/{path.name}", filter=_as_roots)
        for module in MODULES:
            path = _module_path(module)
            archive.add(path, f"modules/{path.name}", filter=_for_guest)
        _add_text(archive, "command", script)
        _add_text(archive, "mark", mark)
        # the guest runs nothing without it: a truncated tar must not pass for a suite without failures
        _add_text(archive, "complete", "")


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(text.encode())
    archive.addfile(info, io.BytesIO(text.encode()))


def _distinct(paths: Sequence[Path]) -> list[Path]:
    """``paths``, each with a name that the guest can tell from the others'."""
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if not path.exists():
            raise HostError(f"{path} is not there")
        if [other.name for other in resolved].count(path.name) > 1:
            raise HostError(f"two of the files for the guest are called {path.name}")
    return resolved


def _for_guest(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """As `_as_roots`; None for caches."""
    name = os.path.basename(info.name)
    return None if name == "__pycache__" or (name.startswith(".") and info.isdir()) else _as_roots(info)


def _as_roots(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """``info`` as root's and readable for all, whatever this checkout's owner and umask."""
    info.uid = info.gid = 0
    info.mode |= 0o555 if info.isdir() or info.mode & 0o100 else 0o444
    return info


def _module_path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise HostError(f"the guest needs the Python module {module}, and {sys.executable} has none")
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin
