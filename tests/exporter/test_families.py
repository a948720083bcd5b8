from __future__ import annotations

import dataclasses

import pytest
from transformers import AutoConfig

from accel.errors import InputError, UnsupportedArchitectureError
from accel.exporter import families
from accel.spec import AttentionSpec, Task
from tests.exporter.models import make_config, make_decoder, make_encoder

LAYER = AttentionSpec(heads=4, kv_heads=2, head_dim=8, scale=0.3, causal=True)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("Qwen3ForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("DistilBertForQuestionAnswering", "question-answering"),
        ("ModernBertForMaskedLM", "fill-mask"),
        ("BertModel", "feature-extraction"),
        (None, "feature-extraction"),
    ],
)
def test_task_by_class_name(architecture: str | None, task: Task) -> None:
    assert families.infer_task(architecture) == task


def test_unknown_task_suggests() -> None:
    assert families.check_task("fill-mask") == "fill-mask"
    with pytest.raises(InputError, match="Did you mean 'text-generation'"):
        families.check_task("text-generatoin")


@pytest.mark.parametrize(("name", "nearest"), [("qwen2_5", "qwen2"), ("gemma3", "gemma2"), ("zzz", "llama")])
def test_nearest_decoder(name: str, nearest: str) -> None:
    assert families.nearest_family(name, "decoder").startswith(nearest[:5])


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("t5", {}, "Encoder-decoder"),
        ("gemma3", {}, "several parts"),
        ("mixtral", {}, "Mixture-of-experts"),
        ("mamba", {}, "linear_attention"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_refused_configs_name_what_to_try(family: str, changes: dict[str, object], says: str) -> None:
    config = AutoConfig.for_model(family, **changes)
    with pytest.raises(UnsupportedArchitectureError, match=rf"{says}.*nearest supported family is \w+"):
        families.check_config(config, "text-generation")


@pytest.mark.parametrize("family", families.DECODERS)
def test_supported_configs_pass(family: str) -> None:
    families.check_config(make_config(family), "text-generation")


def test_causality_must_fit_the_task() -> None:
    decoder, encoder = make_decoder(), make_encoder()
    families.check_causality(decoder, "text-generation")
    families.check_causality(encoder, "feature-extraction")
    with pytest.raises(UnsupportedArchitectureError, match="causal attention.*text-generation"):
        families.check_causality(decoder, "feature-extraction")
    with pytest.raises(UnsupportedArchitectureError, match="bidirectional attention"):
        families.check_causality(encoder, "text-generation")


def test_layers_must_be_as_many_as_the_config_says() -> None:
    config = make_config("llama")
    families.check_layers(config, [LAYER, LAYER])
    with pytest.raises(UnsupportedArchitectureError, match="has 2 layers, but 1 dispatch"):
        families.check_layers(config, [LAYER])


def test_windows_must_reach_the_attention() -> None:
    windowed = dataclasses.replace(LAYER, window=4)
    mistral = make_config("mistral", sliding_window=4)
    families.check_layers(mistral, [windowed, windowed])
    with pytest.raises(UnsupportedArchitectureError, match="Layer 1 should have a sliding window"):
        families.check_layers(mistral, [windowed, LAYER])
    gemma = make_config("gemma2", sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    families.check_layers(gemma, [windowed, LAYER])
    with pytest.raises(UnsupportedArchitectureError, match="Layer 1 should have no window"):
        families.check_layers(gemma, [windowed, windowed])
