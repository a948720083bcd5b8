"""Canonical graph -> the fused nodes that the ``cuda`` engine has kernels for."""

from __future__ import annotations

from accel.graph.lowering.cuda.lower import VERSION, lower

__all__ = ["VERSION", "lower"]
