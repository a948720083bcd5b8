"""The order of the lowering, and its checks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.clean import clean
from accel.graph.lowering.tensorrt.columns import split_columns
from accel.graph.lowering.tensorrt.decoder_attention import lower_cached_attention
from accel.graph.lowering.tensorrt.encoder_attention import lower_attention
from accel.graph.lowering.tensorrt.linear import lower_linear
from accel.graph.lowering.tensorrt.precision import set_precision
from accel.graph.lowering.tensorrt.quantized import lower_quantized
from accel.graph.lowering.unit_batch import drop_unit_batch
from accel.graph.lowering.versions import VERSIONS
from accel.graph.lowering.wanted_tokens import choose_tokens_early
from accel.graph.pipeline import Pass, run_passes
from accel.manifest import PassReport
from accel.scheme import Scheme
from accel.spec import ArchSpec

VERSION = VERSIONS["tensorrt"]
OPSET = 24  # TensorScatter; 25 would leave ONNX Runtime's CPU without an Attention kernel


_FLOATS = Scheme("fp32")


def lower(
    model: ir.Model,
    arch: ArchSpec,
    max_positions: int,
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    scheme: Scheme = _FLOATS,
    static_scales: Mapping[str, float] = MappingProxyType({}),
) -> tuple[ir.Model, tuple[PassReport, ...]]:
    """Returns a new model in TensorRT's dialect and what each pass did.

    Decoders take padded rows: input_ids, position_ids int64 [B, S]; write_index int64 [B]; logits_positions
    int64 [R], indices into the B * S tokens; past.{i}.key/value [B, kv_heads, C, head_dim] in ``dtype``. Outputs:
    logits float32 [R, V], present.{i}.key/value. Encoders keep their inputs; outputs are float32.

    Args:
        model: Canonical model in float32; left as it is.
        max_positions: Rows of the rotary tables; an engine's capacity cannot exceed it.
        dtype: FLOAT, FLOAT16 or BFLOAT16; norms, softmax and logits stay float32, see ``precision``.
        scheme: Which products round their inputs; what weights are stored as, their own tensors say, see ``quantized``.
        static_scales: By a weight's name, the calibrated step of its product's input.

    Raises:
        FusionError: A layer or a private node has no lowering, or a rounded input no step.
    """
    lowered = model.clone()
    lowered.opset_imports[""] = OPSET
    before = lowered.graph.num_nodes()
    decoder = arch.kind == "decoder"
    fused = lower_cached_attention(lowered, arch, max_positions) if decoder else lower_attention(lowered, arch)
    reports = [PassReport("attention", before, lowered.graph.num_nodes(), fused)]
    reports += run_passes(
        lowered,
        (
            ("tokens", choose_tokens_early),
            ("unit_batch", drop_unit_batch if decoder else _nothing),
            *_quantized(lowered, scheme, static_scales),
            ("linear", lower_linear),
            ("columns", split_columns),
            ("clean", clean),
            ("precision", lambda model: set_precision(model, dtype)),
        ),
    )
    _check(lowered, arch)
    lowered.opset_imports.pop("accel", None)
    _name_nodes(lowered)
    return lowered, tuple(reports)


def _quantized(model: ir.Model, scheme: Scheme, static_scales: Mapping[str, float]) -> tuple[tuple[str, Pass], ...]:
    """A pass that graphs in floats do not have."""
    if not scheme.quantized and scheme.base != "fp8":
        return ()
    return (("quantized", lambda model: lower_quantized(model, scheme, static_scales)),)


def _nothing(model: ir.Model) -> int:
    return 0


def _check(model: ir.Model, arch: ArchSpec) -> None:
    left = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain})
    if left:
        raise FusionError(f"nodes without a lowering: {', '.join(left)}", where="tensorrt")
    names = {node.name for node in model.graph}
    for index in range(len(arch.layers)):
        if f"layers.{index}.attention" not in names:
            raise FusionError("the layer lost its attention", where=f"layer {index}, tensorrt")


def _name_nodes(model: ir.Model) -> None:
    """Names of our own for all nodes: the builder finds each one's layers by them, and exports stay repeatable."""
    for index, node in enumerate(model.graph):
        if not (node.name or "").startswith("layers."):
            node.name = f"{node.op_type}_{index}"
    for node in model.graph:
        for place, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}.out{place}" if place else f"{node.name}.out"


__all__ = ["OPSET", "VERSION", "lower"]
