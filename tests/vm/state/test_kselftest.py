"""The kernel's own tests of the proposal, in C, which need nothing of this project."""

import os
import re
import subprocess
from pathlib import Path

import pytest

#: Where the runner puts what it has built in tools/testing/selftests/vdpa.
SELFTESTS = Path("/run/payload/with/selftests")


@pytest.mark.skipif(not SELFTESTS.exists(), reason="the source of this kernel has no tools/testing/selftests/vdpa")
@pytest.mark.parametrize("number", [0, 1])
def test_the_kernel_passes_its_own_tests(nodes, number):
    done = subprocess.run(
        [SELFTESTS / "vhost_vdpa"],
        env=os.environ | {"VHOST_VDPA_NODE": str(nodes[number])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    totals = re.search(r"^# Totals: pass:(\d+) fail:0 xfail:0 xpass:0 skip:0 error:0$", done.stdout, re.MULTILINE)
    assert totals, done.stdout + done.stderr
    assert int(totals[1]) >= 18
    assert done.returncode == 0
