"""Canonical graph -> TensorRT's dialect: standard operators at opset 24, caches updated in place, strong types."""

from accel.graph.lowering.tensorrt.lower import VERSION, lower

__all__ = ["VERSION", "lower"]
