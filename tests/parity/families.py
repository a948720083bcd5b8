"""Tiny models of every supported family, made hard: whatever a graph can lose changes their output.

``from_config`` alone sees little: biases are zero, norm weights one, softcaps far above the scores. Here every
parameter is random, scores are large enough for softcaps of 4, windows are shorter than the prompts, and options
that a family knows (partial rotation, layers without rotation, multipliers) are switched on.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from accel.spec import Kind, Task

VOCAB = 97
PAD = 0
SPREAD = 0.3  # of every parameter: with 64 columns, products have a spread of 2.4

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
_ENCODER = dict(_COMMON, max_position_embeddings=64)
_DECODER = dict(_COMMON, num_key_value_heads=2, max_position_embeddings=160)
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Family:
    """One model: its config, and the task it is exported for."""

    model_type: str
    kind: Kind
    config: dict[str, Any]
    task: Task | None = None  # None: bare encoder, or causal language model
    architecture: str | None = None  # class name, where it is not the kind's auto class

    def make_config(self, **changes: Any) -> Any:
        """The config, with changes laid over it."""
        return AutoConfig.for_model(self.model_type, **{**self.config, **changes})


def _encoder(model_type: str, **config: Any) -> Family:
    return Family(model_type, "encoder", {**_ENCODER, **config})


def _decoder(model_type: str, **config: Any) -> Family:
    return Family(model_type, "decoder", {**_DECODER, **config})


def _head(model_type: str, architecture: str, task: Task, **config: Any) -> Family:
    settings = {**_ENCODER, **config, "num_labels": 5}
    if task == "question-answering":
        settings["num_labels"] = 2
    return Family(model_type, "encoder", settings, task, architecture)


_DISTILBERT = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96}
_MODERNBERT = {
    "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8, "layer_types": [_FULL, _SLIDING, _SLIDING],
    "rope_parameters": {
        _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        _FULL: {"rope_type": "default", "rope_theta": 1000.0},
    },
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 100.0}  # a small base: even the slowest pair turns within a prompt

FAMILIES: dict[str, Family] = {
    "bert": _encoder("bert"),
    "roberta": _encoder("roberta", type_vocab_size=2),
    "distilbert": _encoder("distilbert", **_DISTILBERT),
    "modernbert": _encoder("modernbert", **_MODERNBERT),
    "electra": _encoder("electra", embedding_size=32),
    "mpnet": _encoder("mpnet"),
    "llama": _decoder("llama", rope_parameters=_ROPE),
    "llama_narrow": _decoder("llama", rope_parameters=_ROPE, head_dim=24),  # the kernel refuses to rotate such heads
    "qwen2": _decoder("qwen2", rope_parameters=_ROPE),
    "qwen2_windowed": _decoder(
        "qwen2", rope_parameters=_ROPE, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": _decoder("qwen3", rope_parameters=_ROPE, head_dim=32),
    "mistral": _decoder("mistral", rope_parameters=_ROPE, sliding_window=6, head_dim=32),
    "gemma2": _decoder(
        "gemma2", rope_parameters=_ROPE, head_dim=32, sliding_window=6, query_pre_attn_scalar=16,
        attn_logit_softcapping=4.0, final_logit_softcapping=3.0,
    ),
    "gemma3_text": _decoder(
        "gemma3_text", head_dim=32, sliding_window=6, query_pre_attn_scalar=8, layer_types=[_SLIDING, _FULL, _SLIDING],
        rope_parameters={
            _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
            _FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        },
    ),
    "phi3": _decoder("phi3", rope_parameters=_ROPE),
    "phi3_partial": _decoder(
        "phi3", head_dim=32, sliding_window=6,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
    "gpt2": _decoder("gpt2", n_embd=64, n_layer=3, n_head=4, n_inner=96, n_positions=160, resid_pdrop=0.0),
    "olmo2": _decoder("olmo2", rope_parameters=_ROPE),
    "smollm3": _decoder("smollm3", rope_parameters=_ROPE, no_rope_layers=[1, 0, 1]),
    "granite": _decoder(
        "granite", rope_parameters=_ROPE, attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.6,
        logits_scaling=1.7, attention_bias=True,
    ),
    "starcoder2": _decoder("starcoder2", rope_parameters=_ROPE, sliding_window=6),
}  # fmt: skip

HEADS: dict[str, Family] = {
    "bert_pairs": _head("bert", "BertForSequenceClassification", "text-classification"),
    "roberta_tokens": _head("roberta", "RobertaForTokenClassification", "token-classification", type_vocab_size=1),
    "distilbert_answers": _head("distilbert", "DistilBertForQuestionAnswering", "question-answering", **_DISTILBERT),
    "modernbert_mask": _head("modernbert", "ModernBertForMaskedLM", "fill-mask", **_MODERNBERT),
    "mpnet_mask": _head("mpnet", "MPNetForMaskedLM", "fill-mask"),
}
ALL = {**FAMILIES, **HEADS}
ENCODERS = [name for name, family in FAMILIES.items() if family.kind == "encoder"]
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]


def build_model(name: str, **changes: Any) -> PreTrainedModel:
    """The model of this name, eager attention, fp32; ``changes`` are laid over its config.

    A parameter's values depend on its name and shape alone, so that a changed model differs by the change only.
    """
    family = ALL[name]
    config = family.make_config(**changes)
    if family.architecture is not None:
        model = getattr(transformers, family.architecture)._from_config(config, attn_implementation="eager")
    else:
        auto = AutoModelForCausalLM if family.kind == "decoder" else AutoModel
        model = auto.from_config(config, attn_implementation="eager")
    model.eval().float()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
            # Vectors stay around what they start as: one for norms (zero for Gemma's 1 + w), zero for biases.
            center = parameter.mean() if parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD + center)
    return model
