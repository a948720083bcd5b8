"""The order of the lowering, and its checks."""

from __future__ import annotations

import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.checks import attention_nodes
from accel.graph.clean import clean
from accel.graph.lowering.ort_cpu.elementwise import fuse_bias_gelu, fuse_silu
from accel.graph.lowering.ort_cpu.linear import lower_linear
from accel.graph.lowering.ort_cuda.decoder_attention import lower_cached_attention
from accel.graph.lowering.ort_cuda.encoder_attention import lower_attention
from accel.graph.lowering.ort_cuda.kernels import check_kernels
from accel.graph.lowering.ort_cuda.norms import fuse_skip_norms
from accel.graph.lowering.ort_cuda.quantized import lower_quantized
from accel.graph.lowering.tensorrt.precision import ISLANDS, PRODUCTS, set_precision
from accel.graph.lowering.unit_batch import drop_unit_batch
from accel.graph.lowering.versions import VERSIONS
from accel.graph.lowering.wanted_tokens import choose_tokens_early
from accel.graph.pipeline import run_passes
from accel.manifest import PassReport
from accel.spec import ArchSpec

VERSION = VERSIONS["ort-cuda"]
MICROSOFT = "com.microsoft"
# As for TensorRT: norms and the residual stream stay float32. A step costs two small casts per norm for that.
NORMS = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
KERNELS = frozenset({"FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention"})


def lower(
    model: ir.Model, arch: ArchSpec, max_positions: int, dtype: ir.DataType = ir.DataType.FLOAT
) -> tuple[ir.Model, tuple[PassReport, ...]]:
    """Returns a new model for the CUDA provider of onnxruntime-gpu >= 1.31, and what each pass did.

    Decoders take B rows of S tokens: input_ids, position_ids (where something reads them) int64
    [B * S]; step_shape int64 [3] = B, S, -1, on the host; seqlens_k int32 [B], a row's tokens after the run less one;
    total_length int32 [], the most tokens of a row after the run, on the host; logits_positions int64 [R], indices into
    the B * S tokens; past.{i}.key/value [B, kv_heads, C, head_dim] in ``dtype``. Outputs: logits float32 [R, V]; token
    int64 [R], the first largest logit of each row, and token_logit float32 [R], that logit, or NaN where any of the row
    is; present.{i}.key/value, to be bound to the memory of past. S > 1 with B > 1 is for rows whose pasts are empty.

    Encoders take input_ids and token_type_ids as the model does, and instead of its mask key_mask int32 [M] with
    key_mask_shape int64 [1] = B (keys per row) or [2] = B, S (a mask). Outputs are float32.

    Args:
        model: Canonical model in float32; left as it is.
        max_positions: Rows of the rotary tables; the cache's capacity cannot exceed it.
        dtype: FLOAT, FLOAT16 or BFLOAT16; see ``accel.graph.lowering.tensorrt.precision``. FLOAT16 with integers,
            whose scales are that. A decoder in FLOAT has no CUDA kernel for its attention: it runs on ONNX Runtime's
            CPU kernels.

    Raises:
        FusionError: A layer, a private node or a type has no lowering or no CUDA kernel.
    """
    lowered = model.clone()
    lowered.opset_imports[MICROSOFT] = 1
    before = lowered.graph.num_nodes()
    decoder = arch.kind == "decoder"
    fused = lower_cached_attention(lowered, arch, max_positions) if decoder else lower_attention(lowered, arch)
    reports = [PassReport("attention", before, lowered.graph.num_nodes(), fused)]
    reports += run_passes(
        lowered,
        (
            ("tokens", choose_tokens_early),
            ("quantized", lower_quantized),
            ("linear", lower_linear),
            ("bias_gelu", fuse_bias_gelu),
            ("silu", fuse_silu),
            ("unit_batch", drop_unit_batch if decoder else _nothing),
            ("clean", clean),
            ("skip_norms", fuse_skip_norms),
            ("precision", lambda model: set_precision(model, dtype, ISLANDS | NORMS, PRODUCTS | KERNELS)),
            ("token", _add_token if decoder else _nothing),
        ),
    )
    lowered.opset_imports.pop("accel", None)
    _name_nodes(lowered)
    _check(lowered, arch, dtype)
    return lowered, tuple(reports)


def _nothing(model: ir.Model) -> int:
    return 0


def _add_token(model: ir.Model) -> int:
    """The outputs ``token`` and ``token_logit``: greedy decoding then needs no logits on the host."""
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    last = ir.Value(name="token_axis", const_value=ir.tensor([-1], ir.DataType.INT64, name="token_axis"))
    graph.initializers.add(last)

    def add(op_type: str, operands: list[ir.Value], kind: ir.DataType, **attributes: int) -> ir.Value:
        node = ir.node(op_type, operands, attributes)
        node.outputs[0].type = ir.TensorType(kind)
        graph.append(node)
        return node.outputs[0]

    best = add("ArgMax", [logits], ir.DataType.INT64, axis=-1, keepdims=1)
    token = add("Squeeze", [best, last], ir.DataType.INT64)
    found = add("GatherElements", [logits, best], ir.DataType.FLOAT, axis=-1)
    logit = add("Squeeze", [found, last], ir.DataType.FLOAT)
    total = add("ReduceSum", [logits, last], ir.DataType.FLOAT, keepdims=0)  # no number where one of them is none
    known = add("Equal", [total, total], ir.DataType.BOOL)
    checked = add("Where", [known, logit, total], ir.DataType.FLOAT)
    for place, (value, name) in enumerate(((token, "token"), (checked, "token_logit"))):
        value.name, value.shape = name, ir.Shape(["R"])
        graph.outputs.insert(1 + place, value)
    return 1


def _check(model: ir.Model, arch: ArchSpec, dtype: ir.DataType) -> None:
    left = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain not in ("", MICROSOFT)})
    if left:
        raise FusionError(f"nodes without a lowering: {', '.join(left)}", where="ort-cuda")
    op_type = "GroupQueryAttention" if arch.kind == "decoder" else "MultiHeadAttention"
    found = len(attention_nodes(model, MICROSOFT, op_type))
    if found != len(arch.layers):
        raise FusionError(f"{found} {op_type} nodes for {len(arch.layers)} layers", where=f"layer {found}, ort-cuda")
    if arch.kind == "encoder" or dtype != ir.DataType.FLOAT:
        check_kernels(model)


def _name_nodes(model: ir.Model) -> None:
    """Names of our own for all nodes: exports stay repeatable, and a profile says where the time goes."""
    for index, node in enumerate(model.graph):
        if not (node.name or "").startswith("layers."):
            node.name = f"{node.op_type}_{index}"
        for place, value in enumerate(node.outputs):
            if value.name != "" and not value.is_graph_output():
                value.name = f"{node.name}.out{place}" if place else f"{node.name}.out"


__all__ = ["VERSION", "lower"]
