"""The order of the lowering, and its checks."""

from __future__ import annotations

import onnx_ir as ir

from accel.errors import FusionError, InputError
from accel.graph.clean import clean
from accel.graph.lowering.cuda.attention import lower_attention, lower_cached_attention
from accel.graph.lowering.cuda.quantized import pack_weights
from accel.graph.lowering.cuda.weights import lower_weights
from accel.graph.lowering.fused_linear import DOMAIN, drop_row_reshapes, fuse_activations, fuse_gates, lower_linear
from accel.graph.lowering.unit_batch import drop_unit_batch
from accel.graph.lowering.versions import VERSIONS
from accel.graph.lowering.wanted_tokens import choose_tokens_early
from accel.graph.pipeline import run_passes
from accel.kv_quantization import KvQuantization
from accel.manifest import PassReport
from accel.spec import ArchSpec

VERSION = VERSIONS["cuda"]


def lower(
    model: ir.Model,
    arch: ArchSpec,
    max_positions: int,
    dtype: ir.DataType = ir.DataType.FLOAT,
    kv: KvQuantization | None = None,
) -> tuple[ir.Model, tuple[PassReport, ...]]:
    """Returns a new model in the engine's dialect and what each pass did.

    Inputs and outputs are the canonical graph's; a decoder's caches are in ``dtype``, with ``kv`` in 8 bits. Nodes of
    the domain ``accel.kernels`` (all values float32 to the eye; products are made in the weights' type):

    - ``Linear(x, w_0 .. w_n-1, b_0 .. b_n-1)``: the n products side by side, then ``activation`` if there is one.
    - ``GatedLinear(x, w_gate, w_up, b_gate, b_up)``: activation(gate) * up.
    - Both with ``bits`` 4 or 8: integer weights, packed, w_0 .. w_n-1 followed by their scales s_0 .. s_n-1; see
      ``accel.graph.lowering.cuda.quantized``.
    - ``Gather(words, scales, ids)`` with ``bits``: rows of an integer table, float32.
    - ``CachedAttention(query, key, value, past_key, past_value, past_lengths, query_lengths, cos, sin)``: as the
      canonical node; key and value absent: query holds all three side by side; with tables [positions, D / 2],
      queries and keys are rotated by halves first. Caches in 8 bits: followed by ``key_scales, value_scales``, float32
      [KV, D], of keys after their rotation and values; both tables absent: nothing rotates; ``dtype`` is computed in.
    - ``Attention(query, key, value, attention_mask, bias)``: as the canonical node, packed likewise.

    Args:
        model: Canonical model in float32; left as it is.
        max_positions: Rows of the rotary tables.
        dtype: FLOAT, FLOAT16 or BFLOAT16, of matrices and embeddings that are not quantised, and of caches.
        kv: Scales of a decoder's caches, which become int8 or 8-bit floats; None: they are in ``dtype``.

    Raises:
        FusionError: An attention layer is lost.
        InputError: ``kv`` is not this model's or of integers that the kernels do not have, or the model has no caches.
        ExportError: A weight exceeds the type's range.
    """
    lowered = model.clone()
    lowered.opset_imports[DOMAIN] = 1
    before = lowered.graph.num_nodes()
    decoder = arch.kind == "decoder"
    if kv is not None and not decoder:
        raise InputError("an encoder has no KV cache", where="kv")
    fused = lower_cached_attention(lowered, arch, max_positions, dtype, kv) if decoder else lower_attention(lowered)
    reports = [PassReport("attention", before, lowered.graph.num_nodes(), fused)]
    reports += run_passes(
        lowered,
        (
            ("tokens", choose_tokens_early),
            ("unit_batch", drop_unit_batch if decoder else _nothing),
            ("linear", lower_linear),
            ("reshapes", drop_row_reshapes),
            ("gates", fuse_gates),
            ("activations", fuse_activations),
            ("clean", clean),
            ("pack", pack_weights),
            ("weights", lambda model: lower_weights(model, dtype)),
        ),
    )
    _check(lowered, arch)
    lowered.opset_imports.pop("accel", None)
    for index, node in enumerate(lowered.graph):
        node.name = node.name if (node.name or "").startswith("layers.") else f"{node.op_type}_{index}"
    return lowered, tuple(reports)


def _nothing(model: ir.Model) -> int:
    return 0


def _check(model: ir.Model, arch: ArchSpec) -> None:
    left = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain not in ("", DOMAIN)})
    if left:
        raise FusionError(f"nodes without a lowering: {', '.join(left)}", where="cuda")
    wanted = "CachedAttention" if arch.kind == "decoder" else "Attention"
    found = sum(node.op_type == wanted and node.domain == DOMAIN for node in model.graph)
    if found != len(arch.layers):
        raise FusionError(f"{found} attention nodes for {len(arch.layers)} layers", where=f"layer {found}, cuda")


__all__ = ["VERSION", "lower"]
