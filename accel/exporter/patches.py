"""Every workaround for a library's behaviour, with its range of versions and the test that says when it can go.

``tests/exporter/test_patches.py`` fails once a patch is no longer needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _mpnet_self_attention(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, ...]:
    """MPNetSelfAttention.forward, dispatched by name as every other model's attention is."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
    query, key, value = (part(hidden_states).view(heads).transpose(1, 2) for part in (self.q, self.k, self.v))
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    scaling = 1.0 / math.sqrt(self.attention_head_size)
    output, _ = attend(self, query, key, value, attention_mask, scaling=scaling, bias=position_bias)
    return (self.o(output.reshape(*hidden_states.shape[:-1], -1)),)


@contextmanager
def mpnet_attention_by_name(model: torch.nn.Module) -> Iterator[None]:
    """MPNet computes its attention inline, past the registry (transformers 5.17 to 5.23).

    While this is open its self-attention dispatches by name; nothing else about it changes.
    """
    from transformers.models.mpnet import modeling_mpnet

    cls = modeling_mpnet.MPNetSelfAttention
    layers = [module for module in model.modules() if isinstance(module, cls)]
    original = cls.forward
    for layer in layers:
        layer.config = model.config
    if layers:
        cls.forward = _mpnet_self_attention
    try:
        yield
    finally:
        cls.forward = original
        for layer in layers:
            del layer.config


@contextmanager
def fixed_rotary_frequencies(model: torch.nn.Module) -> Iterator[None]:
    """``dynamic`` and ``longrope`` modules look at the positions' maximum in each pass (transformers 5.17 to 5.23).

    That is a branch on data, which torch.export refuses, or an update of a buffer, which it would leave behind
    in the model. Below the length that ``accel.exporter.arch`` limits a bundle to, the frequencies never change:
    while this is open the modules keep those they have.
    """
    kept: list[tuple[torch.nn.Module, Any]] = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):  # one scheme per layer type
            kept.append((module, kinds))
            module.rope_type = dict.fromkeys(kinds, "default")  # type: ignore[assignment]
        elif isinstance(kinds, str):
            kept.append((module, kinds))
            module.rope_type = "default"  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kinds in kept:
            module.rope_type = kinds
