"""The programs in examples/, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def command(name, *arguments):
    return [sys.executable, str(FOLDER / name), *map(str, arguments)]


def output_of(name, *arguments):
    """What example ``name`` prints; it must end well and say nothing on standard error."""
    done = subprocess.run(
        command(name, *arguments), capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout
