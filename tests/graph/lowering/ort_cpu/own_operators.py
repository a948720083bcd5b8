"""Runs of lowered graphs with the library of accel_cpu, and integer weights for small graphs."""

from __future__ import annotations

from typing import Any

import accel_cpu
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from accel.graph.quantized import QuantizedWeight
from accel.quantized_tensor import QuantizedTensor


def run_own(model: ir.Model, **feeds: Any) -> list[NDArray]:
    """Runs the lowered model; feeds that it does not take are left out."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(str(accel_cpu.library_path()))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {node.name: feeds[node.name] for node in session.get_inputs() if node.name in feeds}))


def store_integers(model: ir.Model, *names: str, bits: int = 8) -> None:
    """Weights [N, K] of the graph become integers with one scale per output, by rounding to nearest."""
    for name in names:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        weight = value.const_value.numpy()
        scales = np.abs(weight).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        values = np.rint(weight / scales).astype(np.int8)
        value.const_value = QuantizedWeight(QuantizedTensor(values, scales.astype(np.float32), bits, 0), 1, name)
