"""The README's first example, as it stands there."""

import contextlib
import io

from ..support.readme import examples


def test_the_example_runs(block_node):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(examples()[0], {})
    assert output.getvalue().splitlines() == ["RunState.SUSPENDED SplitBase(avail_index=0)"]
