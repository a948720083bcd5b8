#!/usr/bin/env python3
"""Builds the TensorRT engines that a jobs file asks for: the same as ``accel warmup``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from accel.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["warmup", *sys.argv[1:]]))
