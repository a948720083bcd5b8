"""Versions of the lowerings, without the lowerings: whether a graph is current must be known at once, and is asked
where no graph is read or made."""

from __future__ import annotations

# Target -> version. Raise it when the same canonical graph lowers to another one; it is part of every engine's key.
VERSIONS = {"ort-cpu": 3, "tensorrt": 2, "cuda": 2, "ort-cuda": 3, "openvino": 1}

__all__ = ["VERSIONS"]
