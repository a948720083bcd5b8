"""CUDA graphs of several sessions in one process."""

from __future__ import annotations

import threading

# Held by whoever captures, and by whoever waits for a whole device, which ends what others capture. ONNX Runtime's own
# captures fail for more: an allocation in another thread for one, which CUDA refuses.
capturing = threading.RLock()

__all__ = ["capturing"]
