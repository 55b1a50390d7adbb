"""`python -m pathways`: the same command as `pathways`."""

from __future__ import annotations

import sys

from pathways.cli import main

if __name__ == "__main__":
    sys.exit(main())
