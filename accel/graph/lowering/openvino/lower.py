"""The order of the lowering, and its checks."""

from __future__ import annotations

import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.lowering.openvino.attention import lower_attention
from accel.graph.lowering.openvino.positions import tabulate_positions, unsafe
from accel.graph.lowering.tensorrt.linear import lower_linear
from accel.graph.pipeline import run_passes
from accel.manifest import PassReport
from accel.spec import ArchSpec

VERSION = 1  # raise it when the same canonical graph lowers to another one


def lower(
    model: ir.Model, arch: ArchSpec, max_positions: int, dtype: ir.DataType = ir.DataType.FLOAT
) -> tuple[ir.Model, tuple[PassReport, ...]]:
    """Returns a new model in standard operators and what each pass did.

    Inputs, outputs and weights are the canonical graph's, in float32, whatever ``dtype`` says: OpenVINO rounds by
    itself, and knows best where (it keeps what is sensitive in float32).

    Args:
        model: Canonical model of an encoder; left as it is.
        max_positions: Longest sequence.
        dtype: What the engine will compute in.

    Raises:
        FusionError: A decoder, a private node without a lowering, or, for another type than float32, integers that are
            made of floats: rounded, they would be others.
    """
    if arch.kind != "encoder":
        raise FusionError("only encoders have a lowering", where="openvino")
    lowered = model.clone()
    before = lowered.graph.num_nodes()
    fused = lower_attention(lowered, arch)
    reports = [PassReport("attention", before, lowered.graph.num_nodes(), fused)]
    # The canonical graph is clean already; cleaning would make stored copies of the joined biases.
    positions = ("positions", lambda model: tabulate_positions(model, max_positions))
    reports += run_passes(lowered, (positions, ("linear", lower_linear)))
    _check(lowered, arch)
    if dtype is not ir.DataType.FLOAT and (found := unsafe(lowered)):
        what = f"OpenVINO would round floats that integers are made of to {dtype.name.lower()}: {found[0]}"
        raise FusionError(what, where="openvino")
    lowered.opset_imports.pop("accel", None)
    return lowered, tuple(reports)


def _check(model: ir.Model, arch: ArchSpec) -> None:
    left = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain})
    if left:
        raise FusionError(f"nodes without a lowering: {', '.join(left)}", where="openvino")
    names = {node.name for node in model.graph}
    for index in range(len(arch.layers)):
        if f"layers.{index}.attention" not in names:
            raise FusionError("the layer lost its attention", where=f"layer {index}, openvino")


__all__ = ["VERSION", "lower"]
