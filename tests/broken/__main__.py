"""``python3 -m tests.broken [NAME ...]``: break the kernel in one way at a time, and see who notices.

Each patch in vm-images/kernel/broken breaks one promise of 6.12 with the proposal of device state. Its first lines say
which promise, which tests have to fail for it (``Caught-by:``), and with which kernel arguments. Ends with 1 if a kernel
passes that should not, or fails for something else than what it was told. ``make test-broken-kernels``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vmimages.__main__ import KERNEL_ARGUMENTS
from vmimages.cache import cache_root, locked
from vmimages.debian import download
from vmimages.host import command, step
from vmimages.kernel import PATCHES

ROOT = Path(__file__).parents[2]
RUN = ROOT / "vm-images/run"
PACKAGE = "linux-source-6.12"


@dataclass(frozen=True)
class Broken:
    """One way to break a kernel."""

    patch: Path
    caught_by: tuple[str, ...]
    arguments: str

    @classmethod
    def read(cls, patch: Path) -> Broken:
        """What the first lines of ``patch`` say."""
        head = patch.read_text().partition("\ndiff --git")[0]
        caught_by = tuple(re.findall(r"^Caught-by: (.*)$", head, re.MULTILINE))
        arguments = re.search(r"^Kernel-arguments: (.*)$", head, re.MULTILINE)
        if not caught_by:
            raise ValueError(f"{patch}: no test is named that catches it")
        return cls(patch, caught_by, arguments[1] if arguments else "")


def tree() -> Path:
    """The source of 6.12 with the proposal; made on first use."""
    place = cache_root() / "broken"
    source = place / PACKAGE
    place.mkdir(parents=True, exist_ok=True)
    patched = place / "patched"
    series = "".join(patch.read_text() for patch in PATCHES)
    with locked(place / ".lock"):
        if not patched.exists() or patched.read_text() != series:
            patched.unlink(missing_ok=True)
            command(["rm", "-rf", source])
            download(PACKAGE, place / "package")
            with step(f"unpacking {PACKAGE}"):
                command(["tar", "-xf", place / "package/usr/src" / f"{PACKAGE}.tar.xz", "-C", place])
            command(["rm", "-rf", place / "package"])
            for patch in PATCHES:
                apply(patch, source)
            patched.write_text(series)
    return source


def apply(patch: Path, source: Path, *more: str) -> None:
    """Change ``source`` by ``patch``."""
    command(["patch", "--quiet", "--force", "--strip=1", *more, "--input", patch], cwd=source)


def failed_tests(source: Path, broken: Broken) -> tuple[set[str], int]:
    """Of the files that have what should catch ``broken``: the tests that failed, and the runner's exit code."""
    files = sorted({name.partition("::")[0] for name in broken.caught_by})
    arguments = f"{KERNEL_ARGUMENTS} {broken.arguments}".strip()
    words = [RUN, source, "--kernel-arguments", arguments, "--", "python3", "-m", "tests.ktap", *files]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    failed = re.findall(r"^not ok \d+ (.*)$", done.stdout, re.MULTILINE)
    return {f"tests/{name}" for name in failed}, done.returncode


def verdict(source: Path, broken: Broken) -> str:
    """What is wrong with the verdict on ``broken``; empty if it is the right one."""
    apply(broken.patch, source)
    try:
        failed, code = failed_tests(source, broken)
    finally:
        apply(broken.patch, source, "--reverse")
    if missed := set(broken.caught_by) - failed:
        return f"passed, or did not run (exit {code}): {', '.join(sorted(missed))}"
    return ""


def main() -> int:
    """Try the kernels that are named, or all."""
    patches = sorted((ROOT / "vm-images/kernel/broken").glob("*.patch"))
    wanted = sys.argv[1:]
    if unknown := set(wanted) - {patch.stem for patch in patches}:
        print(f"there is no broken kernel called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    source = tree()
    problems = 0
    for patch in patches:
        if wanted and patch.stem not in wanted:
            continue
        wrong = verdict(source, Broken.read(patch))
        problems += bool(wrong)
        print(f"{'NOT CAUGHT' if wrong else 'caught'}: {patch.stem}{': ' if wrong else ''}{wrong}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
