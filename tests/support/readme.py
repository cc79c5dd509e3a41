"""The README's examples, ready to run."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def examples():
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return [compile(each, str(README), "exec") for each in found]
