"""``python3 -m vdpabridge``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
