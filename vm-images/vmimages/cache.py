"""What was built once is kept under the user's cache directory, named by the hash of what went into it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["cache_root", "cached", "content_key", "locked", "write_whole"]


def cache_root() -> Path:
    """The directory everything is cached in: ``$VDPABRIDGE_CACHE``, or ``vdpabridge`` under the XDG cache directory."""
    override = os.environ.get("VDPABRIDGE_CACHE")
    root = Path(override or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vdpabridge").absolute()
    if any(character in str(root) for character in " ,:"):
        # kernels do not build below a path with a space or a colon, and QEMU splits its options at commas
        raise ValueError(f"{root}: the cache's path must have no space, comma or colon: set VDPABRIDGE_CACHE")
    return root


def content_key(*parts: str | bytes | Path) -> str:
    """Hash ``parts`` (text, bytes, or files by their content) to the key of a cache entry."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def cached(
    kind: str, key: str, build: Callable[[Path], dict[str, str]], *, has: Sequence[str], again: bool = False
) -> Path:
    """Return the finished directory of ``kind``/``key``, calling ``build`` to fill it when it is not there.

    ``build`` gets an empty directory and returns facts that are kept in ``facts.json`` beside its result; ``has`` are
    files that belong to it: an entry that lacks one is made again. ``again``: make it again even if it lacks nothing;
    the old one stays until the new one is ready. The directory is renamed into place only when ``build`` has returned,
    and a lock makes a second caller wait, so an interrupted or concurrent build never leaves half an entry.
    """
    entry = cache_root() / kind / key

    def whole() -> bool:
        return all((entry / name).exists() for name in ("facts.json", *has))

    if whole() and not again:
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with locked(entry.parent / f".{key}.lock"):
        if whole() and not again:
            return entry
        for left in entry.parent.glob(f".{key}.*/"):
            # the process that made it was killed: otherwise it would hold the lock
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=entry.parent))
        try:
            facts = build(work)
            (work / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
            work.chmod(0o755)
            _put_in_place(work, entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return entry


def _put_in_place(work: Path, entry: Path) -> None:
    if entry.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
        entry.rename(old / "old")
        work.rename(entry)
        shutil.rmtree(old, ignore_errors=True)
    else:
        work.rename(entry)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to file ``path``, which then is complete, or as it was before, also on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", prefix=f".{path.name}.", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` exclusively, waiting for it."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
