"""`python -m aseer` is the command `aseer`."""

from __future__ import annotations

import sys

from aseer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
