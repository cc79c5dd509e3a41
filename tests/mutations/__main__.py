"""``python3 -m tests.mutations [NAME ...]``: make one mistake at a time in a copy of the checkout, and run its tests.

Says which mistakes nobody noticed, and ends with 1 if there are any. ``make mutations``.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from .table import MUTATIONS

ROOT = Path(__file__).resolve().parent.parent.parent
COPIED = ("vdpabridge", "tests", "udev", "vm-images", "pyproject.toml", "README.md", "Makefile", ".ci")
#: A mistake may also show as a test that never ends.
TIME_LIMIT_S = 150


def copy_to(folder):
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)


def notices(mutation, folder):
    """What the tests in ``folder``, which is put right again, say of ``mutation``; empty where nothing."""
    file = folder / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "no end"
    finally:
        file.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0] if lines else f"pytest ended with {done.returncode}"


def main(names):
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="vdpabridge-mutations-") as scratch:
        folders = SimpleQueue()
        jobs = len(os.sched_getaffinity(0))
        for number in range(jobs):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            copy_to(folder)
            folders.put(folder)

        def attempt(mutation):
            folder = folders.get()
            begin_s = time.monotonic()
            try:
                said = notices(mutation, folder)
            finally:
                folders.put(folder)
            print(
                f"{(said and 'noticed') or 'SURVIVED'}: {mutation.name} ({time.monotonic() - begin_s:.0f} s) {said[:120]}",
                flush=True,
            )
            if not said:
                survivors.append(mutation.name)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(attempt, chosen))
    print(
        f"{len(chosen)} mutations, {len(survivors)} that nobody noticed" + "".join(f"\n  {name}" for name in survivors)
    )
    return bool(survivors) or not chosen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
