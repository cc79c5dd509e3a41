"""Measurements: ``python3 -m tests.bench``. Never part of the tests: machines are shared and noisy."""
