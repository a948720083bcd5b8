"""Tiny models for the exporter's tests, cheap enough to build in every test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **changes})


def make_decoder(family: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(family, num_key_value_heads=2, **changes)).eval()


def make_encoder(family: str = "bert", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(make_config(family, **changes)).eval()
