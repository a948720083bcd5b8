"""accel: exports transformer models and runs them fast on whatever hardware it meets.

>>> import accel
>>> accel.export("models/minilm", "bundles/minilm")
>>> accel.load("bundles/minilm").embed(["a sentence"])

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# ONNX Runtime looks at it when it is imported; else it notes device, Python and each model's name for telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["__version__", "add_variant", "build", "drop_variant", "export", "load", "report", "warmup"]

if TYPE_CHECKING:
    from accel.api import export
    from accel.engine_build import build
    from accel.loading import load
    from accel.quality import report
    from accel.variant_removal import drop_variant
    from accel.variants import add_variant
    from accel.warmup_jobs import warmup

_LAZY = {"add_variant": "accel.variants", "build": "accel.engine_build", "export": "accel.api"}
_LAZY |= {"drop_variant": "accel.variant_removal", "load": "accel.loading", "report": "accel.quality"}
_LAZY |= {"warmup": "accel.warmup_jobs"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'accel' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
