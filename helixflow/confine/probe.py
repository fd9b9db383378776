"""`python -m helixflow.confine.probe MODE:PATH…`: says what a service would not reach; silent when it reaches all."""

import os
import sys
from pathlib import Path

from helixflow.terminal import say

READ, WRITE = "r", "w"


def missing(wanted: list[str]) -> str:
    """The first path that cannot be read, or written when its mode says so; empty: none."""
    for each in wanted:
        mode, _, path = each.partition(":")
        need = os.R_OK | (os.W_OK if mode == WRITE else 0) | (os.X_OK if Path(path).is_dir() else 0)
        if not os.access(path, need):
            return path
    return ""


def main() -> int:
    """Loads what every service loads, too: a library that cannot be read would end it later."""
    try:
        import helixflow.cli  # noqa: PLC0415
        import helixflow.core_rs  # noqa: F401, PLC0415
    except (ImportError, OSError) as error:
        say(error)
        return 1
    path = missing(sys.argv[1:])
    say(path)
    return 1 if path else 0


if __name__ == "__main__":
    sys.exit(main())
