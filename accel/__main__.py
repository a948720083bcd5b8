"""``python -m accel``."""

from __future__ import annotations

from accel.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
