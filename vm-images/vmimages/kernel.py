"""Kernels for the test machine: a bzImage from Debian's source package, a source tree, or a ready image."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .cache import cache_root, cached, content_key, locked
from .debian import EXPERIMENTAL, download, newest_package
from .host import BUILD_KERNEL, HostError, command, need, step
from .places import data_folder

__all__ = ["DEFAULT_KERNEL", "KERNELS", "Kernel", "NothingNewer", "kernel"]

#: Change this with the steps below, if their result changes.
RECIPE = "1"
FRAGMENT = data_folder("kernel") / "config"
DEBUG_FRAGMENT = FRAGMENT.with_suffix(".debug")
STATE_FRAGMENT = FRAGMENT.with_suffix(".state")
#: The proposal of device state for vhost-vdpa, in order. The last has the kernel's own tests of it.
PATCHES = tuple(sorted((data_folder("kernel") / "patches").glob("0*.patch")))
#: Turns it into another proposal, with other numbers and other arguments.
OTHER_PATCH = data_folder("kernel") / "other/vhost-vdpa-migration.patch"


@dataclass(frozen=True)
class Recipe:
    """Where a kernel with a name comes from."""

    package: str
    """A pattern of the Debian source package. The group orders several matches."""
    suites: tuple[str, ...] = ()
    """More suites to look into, beside those that have all the others: for release candidates."""
    fragments: tuple[Path, ...] = (FRAGMENT,)
    """The configuration."""
    patches: tuple[Path, ...] = ()
    """What is changed in the source."""

    def with_state(self) -> Recipe:
        """The same kernel, with the proposal of device state."""
        return replace(self, fragments=(*self.fragments, STATE_FRAGMENT), patches=PATCHES)


#: vhost-vdpa cannot resume there, so a state that was saved is not worth much.
_TOO_OLD = "6.1"
_UNPATCHED = {
    "6.12": Recipe(r"linux-source-(6\.12)"),
    "6.1": Recipe(r"linux-source-(6\.1)"),
    "newest": Recipe(r"linux-source-(\d+\.\d+)"),
    "next": Recipe(r"linux-source-(\d+\.\d+)", suites=(EXPERIMENTAL,)),
    "debug": Recipe(r"linux-source-(6\.12)", fragments=(FRAGMENT, DEBUG_FRAGMENT)),
}
#: Names that the runner accepts.
KERNELS = {
    **_UNPATCHED,
    **{f"{name}-state": recipe.with_state() for name, recipe in _UNPATCHED.items() if name != _TOO_OLD},
    "6.12-other": replace(_UNPATCHED["6.12"].with_state(), patches=(*PATCHES[:-1], OTHER_PATCH)),
}
DEFAULT_KERNEL = "6.12"

#: A tree that has it has the proposal.
_SIMULATED_FILE_SERVER = "drivers/vdpa/vdpa_sim/vdpa_sim_fs.c"
_SELFTESTS = "tools/testing/selftests/vdpa"
#: What every test kernel must have.
_NEEDED = re.compile(r"CONFIG_(VDPA|VHOST_VDPA|VIRTIO_VDPA)")
#: What a build leaves in a tree.
_BUILD_PRODUCTS = (
    *(
        "/.git",
        "/.config*",
        "/include/config",
        "/include/generated",
        "/arch/*/include/generated",
        "/arch/*/boot/bzImage",
    ),
    *("*.o", "*.a", "*.ko", "*.mod", "*.mod.c", "*.cmd", "*.order", "*.symvers", "/vmlinux", "/System.map"),
)


class NothingNewer(HostError):
    """There is no release candidate now."""


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel."""

    image: Path
    """The bzImage."""
    headers: Path | None
    """Root of its exported user-space headers (has ``include/linux``), if it was built here."""
    name: str
    """What the user called it."""
    has_state: bool = False
    """Whether it is to have the proposal of device state."""
    selftests: Path | None = None
    """Its own tests of vDPA, built, if the source has some."""

    @property
    def for_guest(self) -> Sequence[Path]:
        """What belongs to this kernel and is of use in the machine that it runs: its headers (linux/vhost.h), its
        tests."""
        headers = [self.headers / "include/linux"] if self.headers and self.has_state else []
        return [*headers, *([self.selftests] if self.selftests else [])]


def kernel(what: str, *, extra_config: Path | None = None, refresh: bool = False) -> Kernel:
    """The kernel ``what``: a name of `KERNELS` (built on first use), a kernel source tree, or a bzImage.

    ``extra_config`` has more symbols for a source tree; ``refresh`` asks Debian for a newer source. Raises
    `HostError` if ``what`` is not one of these, or does not build.
    """
    path = Path(what)
    if what in KERNELS:
        if extra_config is not None:
            raise HostError(f"--config is for a source tree: {what} is Debian's source, with the configuration here")
        recipe = KERNELS[what]
        key = f"{what}-{content_key(recipe.package, *recipe.fragments, *recipe.patches, RECIPE)}"
        files = ("bzImage", "headers/include/linux")
        entry = cached("kernel", key, lambda work: _from_debian(what, work), has=files, again=refresh)
        tests = entry / "selftests"
        return Kernel(
            entry / "bzImage",
            entry / "headers",
            what,
            has_state=bool(recipe.patches),
            selftests=tests if tests.is_dir() else None,
        )
    if (path / "Kbuild").exists() and (path / "Makefile").exists():
        return _from_tree(path.resolve(), extra_config)
    if path.is_file():
        if extra_config is not None:
            raise HostError(f"--config is for a source tree, and {what} is built already")
        if not _is_bootable(path):
            raise HostError(f"{what} is not a kernel: neither a bzImage nor an ELF image")
        return Kernel(path.resolve(), None, what)
    raise HostError(f"{what}: not a kernel name ({', '.join(KERNELS)}), not a kernel source tree and not a bzImage")


def _is_bootable(file: Path) -> bool:
    """Whether QEMU knows what to do with it. Source: Documentation/arch/x86/boot.rst, "header"."""
    with file.open("rb") as image:
        head = image.read(0x206)
    return head[:4] == b"\x7fELF" or head[0x202:] == b"HdrS"


def _from_debian(name: str, work: Path) -> dict[str, str]:
    need(BUILD_KERNEL)
    recipe = KERNELS[name]
    package = newest_package(recipe.package, *recipe.suites)
    if recipe.suites and package == newest_package(recipe.package):
        raise NothingNewer(f"{name}: Debian offers no kernel that is newer than {package}")
    with _scratch() as scratch:
        source, build = scratch / "source", scratch / "build"
        _, version = download(package, source, *recipe.suites)
        with step(f"unpacking {package}"):
            command(["tar", "-xf", source / "usr/src" / f"{package}.tar.xz", "-C", source])
        for patch in recipe.patches:
            command(["patch", "--quiet", "--force", "--strip=1", "--input", patch], cwd=source / package)
        with step(f"building kernel {name} ({version})"):
            _build(source / package, build, recipe.fragments)
        shutil.copy(build / "arch/x86/boot/bzImage", work / "bzImage")
        shutil.copy(build / ".config", work / "config")
        _export(source / package, build, work)
    return {"package": package, "version": version}


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for one build. Its path is always the same, because ccache knows a compilation by its paths too."""
    folder = cache_root() / "kernel" / ".scratch"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _from_tree(tree: Path, extra_config: Path | None) -> Kernel:
    """Build a copy of the user's own tree. Both folders are kept, so the next build is incremental."""
    need(BUILD_KERNEL)
    place = cache_root() / "tree" / content_key(str(tree), FRAGMENT)
    source, build = place / "source", place / "build"
    source.mkdir(parents=True, exist_ok=True)
    with locked(place / ".lock"), step(f"building {tree}"):
        # a copy without what was built in the tree itself: kbuild refuses to build a used tree elsewhere
        leave_out = [f"--exclude={pattern}" for pattern in _BUILD_PRODUCTS]
        command(["rsync", "-a", "--delete", *leave_out, f"{tree}/", f"{source}/"])
        has_state = (source / _SIMULATED_FILE_SERVER).exists()
        more = [*([STATE_FRAGMENT] if has_state else []), *([extra_config.resolve()] if extra_config else [])]
        _build(source, build, (FRAGMENT, *more))
        tests = _export(source, build, place)
    image = build / "arch/x86/boot/bzImage"
    return Kernel(image, place / "headers", str(tree), has_state=has_state, selftests=tests)


def _build(tree: Path, build: Path, fragments: Sequence[Path]) -> None:
    build.mkdir(parents=True, exist_ok=True)
    make = ["make", "-s", f"O={build}"]
    command([*make, "tinyconfig"], cwd=tree)
    merge: list[str | Path] = ["./scripts/kconfig/merge_config.sh", "-m", "-O", build, build / ".config"]
    command([*merge, *fragments], cwd=tree)
    command([*make, "olddefconfig"], cwd=tree)
    for fragment in fragments:
        _check_config(fragment, (build / ".config").read_text(), tree)
    command([*make, *_compiler(), f"-j{len(os.sched_getaffinity(0))}", "bzImage"], cwd=tree)


def _export(tree: Path, build: Path, place: Path) -> Path | None:
    """Put the headers for user space into ``place``, and the tests of vDPA, if there are some. Returns their folder."""
    headers, tests = place / "headers", place / "selftests"
    command(["make", "-s", f"O={build}", "headers_install", f"INSTALL_HDR_PATH={headers}"], cwd=tree)
    if not (tree / _SELFTESTS).is_dir():
        return None
    tests.mkdir(exist_ok=True)
    # static, because the guest has another C library than this machine
    words = [f"OUTPUT={tests}", f"KHDR_INCLUDES=-isystem {headers}/include", "LDFLAGS=-static"]
    command(["make", "-s", "-C", _SELFTESTS, *words], cwd=tree)
    return tests


def _compiler() -> Sequence[str]:
    """The words that have make compile through ccache, if it is to be had: most of a patched kernel is the same as
    without the patches."""
    try:
        need({"ccache": "ccache"})
    except HostError:
        return ()
    os.environ["CCACHE_DIR"] = str(cache_root() / "ccache")
    return ("CC=ccache gcc",)


def _check_config(fragment: Path, config: str, tree: Path) -> None:
    """Raise `HostError` if Kconfig dropped a symbol of ``fragment``, as it does silently if a dependency is missing.

    Symbols that the tree does not know (any more) are only printed, except those that every test kernel must have.
    """
    lines = [line.strip() for line in fragment.read_text().splitlines()]
    # CONFIG_X=n, or that it is not set, is fulfilled if the tree does not know X
    wanted = [line for line in lines if line.startswith("CONFIG_") and "=" in line and not line.endswith("=n")]
    got = set(config.splitlines())
    dropped = [line for line in wanted if line not in got]
    if not dropped:
        return
    known = _symbols(tree)
    fatal = [line for line in dropped if _NEEDED.match(line) or line.partition("=")[0] in known]
    if fatal:
        raise HostError(f"this kernel cannot have {', '.join(fatal)} of {fragment}: a dependency is missing")
    print(f"vm-images: this kernel does not know {', '.join(dropped)} of {fragment}", file=sys.stderr, flush=True)


def _symbols(tree: Path) -> set[str]:
    """Every symbol that the tree's Kconfig files declare."""
    words: list[str | Path] = ["grep", "-rhoE", r"^[[:space:]]*(menu)?config [A-Za-z0-9_]+", "--include=Kconfig*", tree]
    return {f"CONFIG_{line.split()[-1]}" for line in command(words).splitlines()}
