from __future__ import annotations

import pytest
import torch

from accel.errors import InputError, UnsupportedArchitectureError
from accel.exporter.arch import read_arch
from accel.exporter.tracer import probe_layers
from tests.exporter.models import make_decoder, make_encoder


def test_decoder_fields() -> None:
    model = make_decoder(
        "qwen3", head_dim=16, tie_word_embeddings=True
    )  # 4 heads of 16 in 32 columns: not hidden / heads
    arch = read_arch(model, probe_layers(model, "decoder"), "text-generation")
    assert (arch.family, arch.architecture, arch.kind) == ("qwen3", "Qwen3ForCausalLM", "decoder")
    assert (arch.hidden_size, arch.vocab_size, arch.max_positions) == (32, 97, 64)
    assert arch.tied_embeddings
    assert [(layer.heads, layer.kv_heads, layer.head_dim, layer.scale) for layer in arch.layers] == [
        (4, 2, 16, 0.25)
    ] * 2
    assert arch.parameters == sum(p.numel() for p in set(model.parameters()))


def test_untied() -> None:
    model = make_decoder(tie_word_embeddings=False)
    assert not read_arch(model, probe_layers(model, "decoder"), "text-generation").tied_embeddings


@pytest.mark.parametrize(("family", "positions"), [("bert", 64), ("roberta", 62), ("mpnet", 62), ("distilbert", 64)])
def test_learned_positions_count_behind_the_padding_index(family: str, positions: int) -> None:
    model = make_encoder(family, pad_token_id=1 if family in ("roberta", "mpnet") else 0)
    arch = read_arch(model, probe_layers(model, "encoder"), "feature-extraction")
    assert arch.max_positions == positions
    ids = torch.full((1, positions), 5)
    model(input_ids=ids)  # the last position exists
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, positions + 1), 5))


def test_max_positions_can_be_lowered_only() -> None:
    model = make_decoder()
    layers = probe_layers(model, "decoder")
    assert read_arch(model, layers, "text-generation", 16).max_positions == 16
    with pytest.raises(InputError, match="more than the 64"):
        read_arch(model, layers, "text-generation", 65)


def test_longrope_is_limited_to_one_set_of_frequencies(caplog: pytest.LogCaptureFixture) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    model = make_decoder("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    assert read_arch(model, probe_layers(model, "decoder"), "text-generation").max_positions == 32
    assert "limited" in caplog.text


def test_a_head_of_another_vocabulary_is_refused() -> None:
    model = make_decoder(tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 101, bias=False)
    with pytest.raises(UnsupportedArchitectureError, match="another number of tokens"):
        read_arch(model, probe_layers(model, "decoder"), "text-generation")
