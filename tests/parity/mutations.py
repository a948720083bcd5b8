"""Models that differ from a family's by one thing that an export could lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.parity.families import ALL, build_model

Edit = Callable[[Any], None]


@dataclass(frozen=True)
class Mutation:
    """One change of one family: laid over the config, or made to the built model."""

    family: str
    what: str
    config: dict[str, Any] = field(default_factory=dict)
    edit: Edit | None = None

    def build(self) -> PreTrainedModel:
        """The mutated model; every parameter that the change leaves has the family's own values."""
        model = build_model(self.family, **self.config)
        if self.edit is not None:
            with torch.no_grad():
                self.edit(model)
        return model

    def __str__(self) -> str:
        return f"{self.family}: {self.what}"


class NoRotation(nn.Module):
    """Angles of zero in place of a rotary embedding's own."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)


def _scale(factor: float) -> Edit:
    def edit(model: Any) -> None:
        scaled = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), float)]
        assert scaled
        for module in scaled:
            module.scaling *= factor

    return edit


def _replace(leaf: str, make: Callable[[nn.Module], nn.Module]) -> Edit:
    """Replaces every submodule of this name."""

    def edit(model: Any) -> None:
        paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == leaf]
        assert paths
        for path in paths:
            owner = model.get_submodule(path.rpartition(".")[0])
            setattr(owner, leaf, make(getattr(owner, leaf)))

    return edit


def zero_parameter(ending: str) -> Edit:
    """Zeroes the parameters whose names end so."""

    def edit(model: Any) -> None:
        found = [parameter for name, parameter in model.named_parameters() if name.endswith(ending)]
        assert found, ending
        for parameter in found:
            parameter.zero_()

    return edit


def _shuffle_layers(model: Any) -> None:
    (layers,) = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 3)
    layers[0], layers[1] = layers[1], layers[0]


def _shift_positions(model: Any) -> None:
    table = next(p for n, p in model.named_parameters() if n.endswith(("position_embeddings.weight", "wpe.weight")))
    table.copy_(table.roll(1, 0))


def _ignore(argument: str) -> Edit:
    def drop(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != argument}

    return lambda model: model.register_forward_pre_hook(drop, with_kwargs=True)


def _gemma_norms_without_one(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.sub_(1.0)


def _rope(family: str, **changes: Any) -> dict[str, Any]:
    """A changed rotary scheme, in every layer type that has one of its own."""
    rope = ALL[family].config["rope_parameters"]
    nested = {kind: {**scheme, **changes} for kind, scheme in rope.items() if isinstance(scheme, dict)}
    return {"rope_parameters": nested or {**rope, **changes}}


_NO_ROTATION: Edit = _replace("rotary_emb", NoRotation)
_FULL = ["full_attention"] * 3
_TANH, _ERF = "gelu_pytorch_tanh", "gelu"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation("gemma2", "no softcap on the scores", {"attn_logit_softcapping": None}),
    Mutation("gemma2", "no softcap on the logits", {"final_logit_softcapping": None}),
    Mutation("gemma2", "no window", {"layer_types": _FULL}),
    Mutation("gemma2", "window of one more", {"sliding_window": 7}),
    Mutation("gemma2", "windows on the other layers", {"layer_types": [_FULL[0], "sliding_attention", _FULL[0]]}),
    Mutation("gemma2", "scale of the head size", {"query_pre_attn_scalar": 32}),
    Mutation("gemma2", "GELU by erf", {"hidden_activation": _ERF}),
    Mutation("gemma2", "norms of w for 1 + w", edit=_gemma_norms_without_one),
    Mutation("gemma3_text", "no window", {"sliding_window": 160}),
    Mutation("gemma3_text", "window of one less", {"sliding_window": 5}),
    Mutation("gemma3_text", "no linear scaling of the angles", _rope("gemma3_text", rope_type="default")),
    Mutation("gemma3_text", "no norm on the queries", edit=_replace("q_norm", lambda _: nn.Identity())),
    Mutation("mistral", "no window", {"sliding_window": None}),
    Mutation("mistral", "window of one more", {"sliding_window": 7}),
    Mutation("starcoder2", "no window", {"sliding_window": None}),
    Mutation("starcoder2", "GELU by erf", {"hidden_act": _ERF}),
    Mutation("starcoder2", "norm epsilon", {"norm_epsilon": 1e-3}),
    Mutation("phi3_partial", "the whole head rotated", _rope("phi3_partial", partial_rotary_factor=1.0)),
    Mutation("phi3_partial", "no window", {"sliding_window": None}),
    Mutation("qwen2_windowed", "no window", {"use_sliding_window": False, "layer_types": _FULL}),
    Mutation("qwen2_windowed", "windows on every layer", {"layer_types": ["sliding_attention"] * 3}),
    Mutation("qwen2", "no bias on the queries", edit=zero_parameter("q_proj.bias")),
    Mutation("qwen2", "no bias on the keys", edit=zero_parameter("k_proj.bias")),
    Mutation("qwen2", "no bias on the values", edit=zero_parameter("v_proj.bias")),
    Mutation("qwen3", "no norm on the keys", edit=_replace("k_norm", lambda _: nn.Identity())),
    Mutation("qwen3", "another scale", edit=_scale(2**0.5)),  # of a head size guessed as 64 / 4 = 16
    Mutation("olmo2", "no norm on the queries", edit=_replace("q_norm", lambda _: nn.Identity())),
    Mutation("llama", "no rotation", edit=_NO_ROTATION),
    Mutation("llama", "another rotary base", _rope("llama", rope_theta=110.0)),
    Mutation("llama_narrow", "no rotation", edit=_NO_ROTATION),
    Mutation("llama", "another scale", edit=_scale(1.05)),
    Mutation("llama", "layers shuffled", edit=_shuffle_layers),
    Mutation("llama", "norm epsilon", {"rms_norm_eps": 1e-3}),
    Mutation("llama", "GELU for SiLU", {"hidden_act": _ERF}),
    Mutation("smollm3", "every layer rotated", {"no_rope_layers": [1, 1, 1]}),
    Mutation("smollm3", "no layer rotated", {"no_rope_layers": [0, 0, 0]}),
    Mutation("granite", "no embedding multiplier", {"embedding_multiplier": 1.0}),
    Mutation("granite", "no residual multiplier", {"residual_multiplier": 1.0}),
    Mutation("granite", "no attention multiplier", {"attention_multiplier": 0.25}),
    Mutation("granite", "no logits scaling", {"logits_scaling": 1.0}),
    Mutation("gpt2", "GELU by erf", {"activation_function": _ERF}),
    Mutation("gpt2", "no scale", {"scale_attn_weights": False}),
    Mutation("gpt2", "no bias on query, key and value", edit=zero_parameter("c_attn.bias")),
    Mutation("gpt2", "positions of one more", edit=_shift_positions),
    Mutation("gpt2", "norm epsilon", {"layer_norm_epsilon": 1e-3}),
    Mutation("bert", "GELU by tanh", {"hidden_act": _TANH}),
    Mutation("bert", "no bias on the queries", edit=zero_parameter("query.bias")),
    Mutation("bert", "no bias on the values", edit=zero_parameter("value.bias")),
    Mutation("bert", "no bias behind attention", edit=zero_parameter("attention.output.dense.bias")),
    Mutation("bert", "no bias before GELU", edit=zero_parameter("intermediate.dense.bias")),
    Mutation("bert", "no bias on norms", edit=zero_parameter("LayerNorm.bias")),
    Mutation("bert", "another scale", edit=_scale(1.05)),
    Mutation("bert", "layers shuffled", edit=_shuffle_layers),
    Mutation("bert", "norm epsilon", {"layer_norm_eps": 1e-3}),
    Mutation("bert", "padding attended to", edit=_ignore("attention_mask")),
    Mutation("bert", "token types ignored", edit=_ignore("token_type_ids")),
    Mutation("distilbert", "GELU by tanh", {"activation": _TANH}),
    Mutation("roberta", "positions of one more", edit=_shift_positions),
    Mutation("electra", "no bias behind the embeddings", edit=zero_parameter("embeddings_project.bias")),
    Mutation("mpnet", "no relative positions", edit=zero_parameter("relative_attention_bias.weight")),
    Mutation("mpnet", "padding attended to", edit=_ignore("attention_mask")),
    Mutation("modernbert", "no window", {"local_attention": 128}),
    Mutation("modernbert", "window of one more", {"local_attention": 10}),
    Mutation("modernbert", "no rotation", edit=_NO_ROTATION),
    Mutation("modernbert", "another rotary base", _rope("modernbert", rope_theta=110.0)),
    Mutation("modernbert", "GELU by tanh", {"hidden_activation": _TANH}),
    Mutation("modernbert", "norm epsilon", {"norm_eps": 1e-3}),
)
