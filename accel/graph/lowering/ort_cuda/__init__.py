"""Canonical graph -> ONNX Runtime's CUDA dialect: its contrib ops, its cache layout, fp32, fp16 and bf16."""

from accel.graph.lowering.ort_cuda.lower import VERSION, lower

__all__ = ["VERSION", "lower"]
