"""What was built once is kept under the user's cache directory, named by the hash of what went into it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["cache_root", "cached", "content_key", "forget", "locked"]


def cache_root() -> Path:
    """The directory everything is cached in: ``$VDPABRIDGE_CACHE``, or ``vdpabridge`` under the XDG cache directory."""
    override = os.environ.get("VDPABRIDGE_CACHE")
    root = Path(override or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vdpabridge")
    if any(character in str(root) for character in " ,"):
        # kernels do not build below a path with a space, and QEMU splits its options at commas
        raise ValueError(f"{root}: the cache's path must have no space and no comma: set VDPABRIDGE_CACHE")
    return root


def content_key(*parts: str | bytes | Path) -> str:
    """Hash ``parts`` (text, bytes, or files by their content) to the key of a cache entry."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def cached(kind: str, key: str, build: Callable[[Path], dict[str, str]]) -> Path:
    """Return the finished directory of ``kind``/``key``, calling ``build`` to fill it when it is not there.

    ``build`` gets an empty directory and returns facts that are kept in ``facts.json`` beside its result. The
    directory is renamed into place only when ``build`` returned, and a lock makes a second caller wait, so an
    interrupted or concurrent build never leaves half an entry.
    """
    entry = cache_root() / kind / key
    if (entry / "facts.json").exists():
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with locked(entry.parent / f".{key}.lock"):
        if (entry / "facts.json").exists():
            return entry
        work = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=entry.parent))
        try:
            facts = build(work)
            (work / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
            work.chmod(0o755)
            work.rename(entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return entry


def forget(kind: str, key: str) -> None:
    """Drop an entry, so that it is built again."""
    shutil.rmtree(cache_root() / kind / key, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` exclusively, waiting for it."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
