"""Attention as one node per layer: the functions that transformers dispatches to while we trace.

transformers looks attention up by name in two registries. Under the names registered here
it calls ``probe_attention`` (reads every layer's shapes and options on a tiny eager run) or
``trace_attention`` (emits one ``accel`` node), and gets no mask, because the node carries
causality, window, padding and row lengths itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from accel.errors import UnsupportedArchitectureError
from accel.spec import AttentionSpec

PROBE, TRACE = "accel_probe", "accel_trace"
DOMAIN = "accel"

# Options that change the result and that the canonical nodes cannot express (yet): refused, never dropped.
_REFUSED_OPTIONS = ("s_aux", "sinks", "position_bias", "head_mask", "block_mask", "indexer_topk", "cu_seq_lens_q")


@dataclass
class StepTensors:
    """The decoder inputs that attention needs but does not receive through the model's forward."""

    past: list[tuple[torch.Tensor, torch.Tensor]]  # per layer, [B, kv_heads, C, head_dim]
    past_lengths: torch.Tensor  # int32 [B]
    query_lengths: torch.Tensor  # int32 [B]


@dataclass
class AttentionContext:
    """What one forward pass collects, layer by layer, in call order."""

    causal: bool
    step: StepTensors | None = None
    attention_mask: torch.Tensor | None = None  # encoders: int64 [B, S]
    layers: list[AttentionSpec] = field(default_factory=list)
    present: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


_context: ContextVar[AttentionContext] = ContextVar("accel_attention_context")


@contextmanager
def attention_context(model: PreTrainedModel, implementation: str, context: AttentionContext) -> Iterator[None]:
    """Routes the model's attention through ``implementation`` and restores the model afterwards."""
    # The config is set directly: set_attn_implementation refuses models (MPNet) that a patch makes dispatch by name.
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)
        model.config._attn_implementation = before


def describe_layer(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, options: dict[str, Any]
) -> AttentionSpec:
    """Reads one layer's spec off the tensors, query [B, H, S, D], key and value [B, KV, S, D]."""
    context = _context.get()
    index = len(context.layers)
    refused = [name for name in _REFUSED_OPTIONS if options.get(name) is not None]
    if value.shape[-1] != key.shape[-1]:
        refused.append(f"value heads of {value.shape[-1]} beside key heads of {key.shape[-1]}")
    if refused:
        raise UnsupportedArchitectureError(
            f"attention uses {', '.join(refused)}, which the canonical attention node does not express",
            where=f"layer {index}",
            remedy="Export a model without it, or open an issue naming the model",
        )
    window, softcap = options.get("sliding_window"), options.get("softcap")
    if window and not context.causal:
        window -= 1  # bidirectional layers pass the inclusive half-window plus one (flash attention's convention)
    return AttentionSpec(
        heads=int(query.shape[1]),
        kv_heads=int(key.shape[1]),
        head_dim=int(query.shape[3]),
        scale=float(query.shape[3] ** -0.5 if scaling is None else scaling),
        window=int(window) if window else None,
        softcap=float(softcap) if softcap else None,
        causal=context.causal,
    )


def probe_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Records the layer and returns values of the right shape [B, S, H, D]; nothing is attended to."""
    _context.get().layers.append(describe_layer(query, key, value, scaling, options))
    return query.transpose(1, 2), None


def trace_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Emits this layer's ``accel::CachedAttention`` (causal) or ``accel::Attention`` node.

    Args:
        query: [B, H, S, D], rotary already applied; B is 1 for decoders (packed tokens).
        bias: Added to the scores, [B or 1, H, S, S] (relative positions); encoders only.
    """
    context = _context.get()
    spec = describe_layer(query, key, value, scaling, options)
    index = len(context.layers)
    context.layers.append(spec)
    emit = _emit_cached if context.causal else _emit_bidirectional
    flat = [_merge_heads(tensor) for tensor in (query, key, value)]
    output = emit(context, index, spec, flat, bias)
    batch, _, length, _ = query.shape
    return output.reshape(batch, length, spec.heads, spec.head_dim), None


def _merge_heads(tensor: torch.Tensor) -> torch.Tensor:
    batch, heads, length, dim = tensor.shape
    return tensor.transpose(1, 2).reshape(batch, length, heads * dim)


def _attributes(spec: AttentionSpec) -> dict[str, int | float]:
    attributes: dict[str, int | float] = {"num_heads": spec.heads, "kv_num_heads": spec.kv_heads, "scale": spec.scale}
    if spec.window is not None:
        attributes["window"] = spec.window
    if spec.softcap is not None:
        attributes["softcap"] = spec.softcap
    return attributes


def _emit_cached(
    context: AttentionContext, index: int, spec: AttentionSpec, qkv: list[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    if bias is not None:
        raise UnsupportedArchitectureError("cached attention with a score bias", where=f"layer {index}")
    step = context.step
    assert step is not None, "a causal trace needs its step tensors"
    past_key, past_value = step.past[index]
    packed = [tensor.reshape(tensor.shape[1], tensor.shape[2]) for tensor in qkv]  # [1, T, W] -> [T, W]
    output, key, value = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::CachedAttention",
        [*packed, past_key, past_value, step.past_lengths, step.query_lengths],
        _attributes(spec),
        dtypes=[packed[0].dtype, past_key.dtype, past_value.dtype],
        shapes=[list(packed[0].shape), list(past_key.shape), list(past_value.shape)],
        version=1,
    )
    context.present.append((key, value))
    return output


def _emit_bidirectional(
    context: AttentionContext, index: int, spec: AttentionSpec, qkv: list[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    assert context.attention_mask is not None, "a bidirectional trace needs its attention mask"
    inputs = [*qkv, context.attention_mask] + ([bias] if bias is not None else [])
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention",
        inputs,
        _attributes(spec),
        dtype=qkv[0].dtype,
        shape=list(qkv[0].shape),
        version=1,
    )


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The mask function of both names: the node expresses the mask itself."""


for _name, _function in ((PROBE, probe_attention), (TRACE, trace_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _no_mask)
