"""The newest kernel's user-space headers that Debian has, without building that kernel."""

from __future__ import annotations

import shutil
from pathlib import Path

from .cache import cached, content_key
from .debian import download

__all__ = ["newest_headers"]

_PACKAGE = "linux-libc-dev"
_RECIPE = "1"


def newest_headers() -> Path:
    """An include folder (has ``linux/vhost.h``); fetched on first use."""
    return cached("headers", content_key(_PACKAGE, _RECIPE), _build, has=["include/linux"]) / "include"


def _build(work: Path) -> dict[str, str]:
    package, version = download(_PACKAGE, work / "package")
    # linux/ and asm-generic/ only: for what is used here, asm/ of the machine's own compiler is enough
    (package / "usr/include").rename(work / "include")
    shutil.rmtree(package)
    return {"version": version}
