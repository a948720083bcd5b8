from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from accel.errors import UnsupportedArchitectureError
from accel.exporter.attention import PROBE, AttentionContext, attention_context, probe_attention, trace_attention
from accel.exporter.tracer import probe_layers
from accel.spec import AttentionSpec

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "vocab_size": 11, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
QUERY, KEY = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)


@pytest.fixture(scope="module")
def llama() -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL), attn_implementation="eager").eval()


def probe(model: Any, causal: bool = True, **options: Any) -> AttentionSpec:
    """What one call of an attention layer is read as."""
    context = AttentionContext(causal=causal)
    with attention_context(model, PROBE, context):
        probe_attention(model, QUERY, KEY, KEY, **options)
    return context.layers[0]


def test_a_layer_is_read_off_its_tensors(llama: Any) -> None:
    layer = probe(llama, scaling=0.3, sliding_window=5, softcap=20.0)
    assert layer == AttentionSpec(4, 2, 8, 0.3, window=5, softcap=20.0, causal=True)


def test_defaults(llama: Any) -> None:
    assert probe(llama) == AttentionSpec(4, 2, 8, 8**-0.5, None, None, True)
    assert probe(llama, scaling=0.3, sliding_window=0, softcap=0.0) == AttentionSpec(4, 2, 8, 0.3, None, None, True)


def test_bidirectional_windows_are_passed_with_one_more(llama: Any) -> None:
    assert probe(llama, causal=False, sliding_window=5).window == 4


@pytest.mark.parametrize("option", ["s_aux", "sinks", "position_bias", "head_mask", "block_mask"])
def test_options_that_no_node_expresses_are_refused(llama: Any, option: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=rf"{option}.*\(at layer 0\)"):
        probe(llama, **{option: torch.zeros(4)})


def test_value_heads_of_another_size_are_refused(llama: Any) -> None:
    context = AttentionContext(causal=True)
    with (
        attention_context(llama, PROBE, context),
        pytest.raises(UnsupportedArchitectureError, match="value heads of 16 beside key heads of 8"),
    ):
        probe_attention(llama, QUERY, KEY, torch.zeros(1, 2, 3, 16))


def test_score_bias_in_a_decoder_is_refused(llama: Any) -> None:
    with (
        attention_context(llama, PROBE, AttentionContext(causal=True)),
        pytest.raises(UnsupportedArchitectureError, match="cached attention with a score bias"),
    ):
        trace_attention(llama, QUERY, KEY, KEY, bias=torch.zeros(1, 4, 3, 3))


def test_the_model_gets_its_implementation_back(llama: Any) -> None:
    with pytest.raises(RuntimeError), attention_context(llama, PROBE, AttentionContext(causal=True)):
        assert llama.config._attn_implementation == PROBE
        raise RuntimeError
    assert llama.config._attn_implementation == "eager"


def test_probe_reads_every_layer_in_order() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = AutoConfig.for_model(
        "gemma2", **{**SMALL, "num_hidden_layers": 3}, head_dim=16, sliding_window=7, layer_types=kinds,
        query_pre_attn_scalar=4, attn_logit_softcapping=30.0,
    )  # fmt: skip
    layers = probe_layers(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), "decoder")
    assert [layer.window for layer in layers] == [7, None, 7]
    assert {(layer.heads, layer.kv_heads, layer.head_dim, layer.scale, layer.softcap) for layer in layers} == {
        (4, 2, 16, 0.5, 30.0)
    }


def test_head_size_is_not_guessed() -> None:
    config = AutoConfig.for_model("qwen3", **SMALL, head_dim=24)
    layers = probe_layers(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), "decoder")
    assert {layer.head_dim for layer in layers} == {24}, "hidden_size / heads would be 8"


def test_modernbert_windows() -> None:
    config = AutoConfig.for_model(
        "modernbert", **SMALL, cls_token_id=1, sep_token_id=2, local_attention=6,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    layers = probe_layers(AutoModel.from_config(config, attn_implementation="eager").eval(), "encoder")
    assert [layer.window for layer in layers] == [None, 3]
