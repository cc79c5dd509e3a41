"""The vdpa netlink family without a kernel that has it; with one it is tested in tests/vm/test_bus.py."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

PARTS = """
import sys
from vdpabridge.bus.netlink import _parts_of_pyroute2
with _parts_of_pyroute2():
    from pyroute2.netlink.generic import GenericNetlinkSocket
assert not any(name in sys.modules for name in ("pyroute2", "pyroute2.ndb", "pyroute2.ndb.main", "pyroute2.conntrack"))
import pyroute2
assert pyroute2.IPRoute
from pyroute2.netlink.generic import GenericNetlinkSocket as again
assert again is GenericNetlinkSocket
with _parts_of_pyroute2():
    assert sys.modules["pyroute2"] is pyroute2
"""


def test_only_the_parts_of_pyroute2_that_are_used_are_imported():
    """And whoever wants all of it in the same process gets it."""
    done = subprocess.run([sys.executable, "-c", PARTS], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
