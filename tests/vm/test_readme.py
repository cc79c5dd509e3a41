"""The README's example, as it stands there."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def test_the_example_runs(block_node):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(example, str(README), "exec"), {})
    assert output.getvalue().splitlines() == ["RunState.SUSPENDED SplitBase(avail_index=0)"]
