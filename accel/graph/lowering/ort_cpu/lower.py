"""The order of the lowering, and its checks."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial

import accel_cpu
import onnx_ir as ir
from onnx_ir.passes import common

from accel.errors import FusionError, InputError
from accel.graph.checks import attention_nodes
from accel.graph.clean import clean
from accel.graph.lowering.fused_linear import fuse_activations, fuse_gates
from accel.graph.lowering.ort_cpu.best_token import add_best_token
from accel.graph.lowering.ort_cpu.decoder_attention import lower_cached_attention
from accel.graph.lowering.ort_cpu.elementwise import fuse_bias_gelu, fuse_silu, lower_rms_norm
from accel.graph.lowering.ort_cpu.embedding import take_out_embedding
from accel.graph.lowering.ort_cpu.encoder_attention import lower_attention
from accel.graph.lowering.ort_cpu.linear import lower_linear, split_head
from accel.graph.lowering.ort_cpu.norms import fuse_norms
from accel.graph.lowering.ort_cpu.quantized import DOMAIN as QUANTIZED
from accel.graph.lowering.ort_cpu.quantized import fuse_residuals, lower_quantized, mark_quantized
from accel.graph.lowering.unit_batch import drop_unit_batch
from accel.graph.lowering.versions import VERSIONS
from accel.graph.lowering.wanted_tokens import choose_tokens_early
from accel.graph.pipeline import run_passes
from accel.kv_quantization import KvQuantization
from accel.manifest import PassReport
from accel.scheme import Scheme
from accel.spec import ArchSpec

MICROSOFT = "com.microsoft"
VERSION = VERSIONS["ort-cpu"]
_PLAIN = Scheme("fp32")


def lower(
    model: ir.Model,
    arch: ArchSpec,
    max_positions: int,
    parameters: Container[str] = (),
    scheme: Scheme = _PLAIN,
    static_scales: Mapping[str, float] | None = None,
    kv: KvQuantization | None = None,
) -> tuple[ir.Model, tuple[PassReport, ...]]:
    """Returns a new model for ONNX Runtime CPU (>= 1.32) and what each pass did.

    Weights that are quantised (see ``accel.graph.quantized``) take the operators of ``accel_cpu``.

    Args:
        model: Canonical model; left as it is.
        max_positions: Rows of the rotary tables; the cache's capacity cannot exceed it.
        parameters: Initializers that will stand in the weight file: a decoder's session reads its embedding from there.
        scheme: How activations are rounded where weights are integers.
        static_scales: By a weight's name, its input's calibrated scale, for static activations.
        kv: Scales of a decoder's caches, which become integers; None: they stay float32.

    Raises:
        FusionError: fewer lowered attention nodes than layers, or a head size that the kernel refuses.
        InputError: ``kv`` is not this model's, or the model has no caches.
    """
    lowered = model.clone()
    lowered.opset_imports[MICROSOFT] = 1
    before = lowered.graph.num_nodes()
    if arch.kind == "decoder":
        packed, rotary = lower_cached_attention(lowered, arch, max_positions, kv)
        fused = {"GroupQueryAttention": len(arch.layers), "packed_qkv": packed, "rotary_in_attention": rotary}
        fused |= {f"int{kv.bits}_cache": len(arch.layers)} if kv is not None else {}
    elif kv is not None:
        raise InputError("an encoder has no KV cache", where="kv")
    else:
        own = lower_attention(lowered, arch, scheme.quantized)
        counts = {"Attention / MultiHeadAttention": len(arch.layers) - own, "accel.cpu::Attention": own}
        fused = {name: count for name, count in counts.items() if count}
    _prune(lowered)
    reports = [PassReport("attention", before, lowered.graph.num_nodes(), fused)]
    reports += run_passes(
        lowered,
        (
            ("tokens", choose_tokens_early),
            ("quantized", mark_quantized),
            ("gates", fuse_gates),
            ("activations", fuse_activations),
            ("linear", lower_linear),
            ("rms_norm", lower_rms_norm),
            ("bias_gelu", fuse_bias_gelu),
            ("silu", fuse_silu),
            ("unit_batch", drop_unit_batch if arch.kind == "decoder" else _nothing),
            ("clean", clean),
            ("pack", lambda model: lower_quantized(model, scheme, static_scales or {})),
            ("residuals", fuse_residuals),
            ("norms", fuse_norms),
            ("split_head", lambda model: split_head(model, arch)),
            ("embedding", partial(take_out_embedding, parameters=parameters) if arch.kind == "decoder" else _nothing),
            ("best_token", add_best_token if arch.kind == "decoder" else _nothing),
        ),
    )
    _check(lowered, arch)
    return lowered, tuple(reports)


def _nothing(model: ir.Model) -> int:
    return 0


def _prune(model: ir.Model) -> None:
    common.RemoveUnusedNodesPass()(model)


def _check(model: ir.Model, arch: ArchSpec) -> None:
    kernels = [("GroupQueryAttention", MICROSOFT)]
    if arch.kind == "encoder":
        kernels = [("If", ""), (accel_cpu.ATTENTION, accel_cpu.DOMAIN)]
    found = sum(len(attention_nodes(model, domain, op_type)) for op_type, domain in kernels)
    if found != len(arch.layers):
        names = " and ".join(op_type for op_type, _ in kernels)
        raise FusionError(f"{found} {names} nodes for {len(arch.layers)} layers", where=f"layer {found}, ort-cpu")
    known = ("", MICROSOFT, QUANTIZED)
    left = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain not in known})
    if left:
        raise FusionError(f"nodes without a lowering: {', '.join(left)}", where="ort-cpu")
