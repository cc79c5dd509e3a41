"""What the fuzzer has found, and what hypothesis makes up."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import binary

from ..support.random_front_end import drive

REGRESSIONS = sorted((Path(__file__).parent / "regressions").iterdir())


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.name)
def test_what_was_found(path):
    drive(path.read_bytes())


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(binary(max_size=600))
def test_any_bytes(data):
    drive(data)
