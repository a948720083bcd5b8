"""Small graphs from ONNX's text form, and runs of them before and after a pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper, parser, shape_inference
from onnx_ir.passes import common

from accel.graph.functions import attach

TOLERANCE = 2e-6  # of the largest value: fp32 sums in another order
HEADER = '<ir_version: 10, opset_import: ["": 23, "accel": 1, "com.microsoft": 1]>'


def make(text: str, **weights: Any) -> ir.Model:
    """A model from ``name (inputs) => (outputs) { nodes }``, its intermediate shapes inferred.

    Inputs named in ``weights`` become initializers; weights that are no inputs too.
    """
    proto = parser.parse_model(HEADER + text)
    for value in [value for value in proto.graph.input if value.name in weights]:
        proto.graph.input.remove(value)
    for name, data in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    return ir.from_proto(shape_inference.infer_shapes(proto, data_prop=True))


def body(steps: dict[str, str]) -> str:
    """Nodes ``name = step``, each behind the ones whose names it reads."""
    lines: list[str] = []
    waiting = dict(steps)
    while waiting:
        ready = {
            name: step
            for name, step in waiting.items()
            if not waiting.keys() & set(re.findall(r"\w+", step[step.rindex("(") :]))
        }
        lines += [f"{name} = {step}" for name, step in ready.items()]
        waiting = {name: step for name, step in waiting.items() if name not in ready}
    return "{\n" + "\n".join(lines) + "\n}"


def ops(model: ir.Model) -> list[str]:
    """The nodes' types in graph order."""
    return [node.op_type for node in model.graph]


def count(model: ir.Model, op_type: str) -> int:
    """Nodes of one type."""
    return ops(model).count(op_type)


def run(model: ir.Model, **feeds: Any) -> list[NDArray]:
    """Runs the model; private ops by their function bodies. Feeds that it does not take are left out."""
    copied = model.clone()
    attach(copied)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(copied).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {node.name: feeds[node.name] for node in session.get_inputs() if node.name in feeds}))


def assert_close(found: list[NDArray], expected: list[NDArray], tolerance: float = TOLERANCE) -> None:
    """Every output within ``tolerance`` of its largest value."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.shape == b.shape and a.dtype == b.dtype and np.isfinite(b).all()
        assert np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), 1e-3)


def apply(rewrite: Callable[[ir.Model], int], model: ir.Model, **feeds: Any) -> int:
    """Runs a pass in place, requires equal results before and after, and returns what it reports."""
    before = run(model, **feeds)
    applied = rewrite(model)
    common.RemoveUnusedNodesPass()(model)
    assert_close(run(model, **feeds), before)
    return applied


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Standard normal float32 values."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)
