"""The command line: parsing and printing only. Everything it does is in the packages beside it."""

from .main import main

__all__ = ["main"]
