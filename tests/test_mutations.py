"""The table of mutations keeps up with the code. To try them takes minutes: ``make mutations``."""

from collections import Counter
from pathlib import Path

import pytest

from .mutations.table import MUTATIONS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_the_text_to_change_is_there_once(mutation):
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert all((ROOT / path).exists() for path in mutation.tests)


def test_names_are_names():
    assert max(Counter(mutation.name for mutation in MUTATIONS).values()) == 1
