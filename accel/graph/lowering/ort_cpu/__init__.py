"""Canonical graph -> ONNX Runtime's CPU dialect: its contrib ops, its cache layout, fp32."""

from accel.graph.lowering.ort_cpu.lower import VERSION, lower

__all__ = ["VERSION", "lower"]
