"""Debian's archive as this machine is set up to reach it, for suites this machine does not itself run.

apt is asked which site it uses; a private apt root then reads other suites from that same site. No site is named
here, and the machine's own apt configuration is not touched.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from . import cache as store
from .host import HostError, as_root, command, step

__all__ = ["EXPERIMENTAL", "archive_sources", "download", "newest_package"]

#: The suites that hold what is built here: 6.1 is in bookworm, 6.12 in trixie, the newest kernel in testing.
SUITES = ("bookworm", "trixie", "testing")
#: Where release candidates are.
EXPERIMENTAL = "experimental"
_NO_SECURITY = ("testing", EXPERIMENTAL)
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@cache
def archive_sources(*suites: str) -> str:
    """One-line-style apt sources for ``suites`` (and their security updates), on the sites this machine uses."""
    sites = _sites()
    if "Debian" not in sites:
        with step("reading this machine's package lists"):
            command([*as_root(), "apt-get", "update", "-qq"])
        sites = _sites()
    if "Debian" not in sites:
        raise HostError("apt on this machine knows no Debian archive: use a Debian machine")
    signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    lines = [f"deb {signed}{sites['Debian']} {suite} main" for suite in suites]
    if "Debian-Security" in sites:
        lines += [
            f"deb {signed}{sites['Debian-Security']} {suite}-security main"
            for suite in suites
            if suite not in _NO_SECURITY
        ]
    return "\n".join(lines) + "\n"


def _sites() -> dict[str, str]:
    """Archive label -> site, of Debian's own archives that this machine's apt knows."""
    listing = command(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(SITE)", "Created-By: Packages"])
    rows = [line.split("|") for line in listing.splitlines()]
    return {label: site for origin, label, site in rows if origin == "Debian"}


@cache
def _apt_options(*more: str) -> tuple[str, ...]:
    """The options that make apt read `SUITES`, and ``more``."""
    root = store.cache_root() / "-".join(("apt", *more))
    for folder in ("etc/apt/preferences.d", "state/lists/partial", "cache/archives/partial"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "etc/apt/sources.list").write_text(archive_sources(*SUITES, *more))
    options = (
        *(
            "-o",
            f"Dir::Etc={root}/etc/apt",
            "-o",
            f"Dir::State::lists={root}/state/lists",
            "-o",
            f"Dir::Cache={root}/cache",
        ),
        # testing's Release file can be past its date; it is still signed
        *("-o", "Acquire::Check-Valid-Until=false", "-o", "APT::Sandbox::User="),
    )
    with step("reading Debian's package lists"), store.locked(root / "lock"):
        command(["apt-get", *options, "update", "-qq"])
    return options


def newest_package(pattern: str, *more: str) -> str:
    """The package whose name matches ``pattern``, with the highest number in the pattern's one group.

    ``more``: suites to look into beside `SUITES`.
    """
    names = command(["apt-cache", *_apt_options(*more), "pkgnames"]).split()
    found = [(tuple(map(int, match[1].split("."))), name) for name in names if (match := re.fullmatch(pattern, name))]
    if not found:
        raise HostError(f"Debian's lists have no package like {pattern}")
    return max(found)[1]


def download(package: str, into: Path, *more: str) -> tuple[Path, str]:
    """Fetch ``package``, also from suites ``more``, unpack it under ``into``; returns that folder and the version."""
    with step(f"downloading {package}"):
        into.mkdir(parents=True, exist_ok=True)
        command(["apt-get", *_apt_options(*more), "download", "-qq", package], cwd=into)
        archive = next(into.glob(f"{package}_*.deb"))
        command(["dpkg-deb", "-x", archive, into])
        version = command(["dpkg-deb", "-f", archive, "Version"]).strip()
        archive.unlink()
    return into, version
