"""Each workaround does what it says, and is still needed; a test that fails here says that a patch can go."""

from __future__ import annotations

import inspect
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, MPNetModel
from transformers.models.mpnet import modeling_mpnet

from accel.errors import UnsupportedArchitectureError
from accel.exporter.attention import PROBE, AttentionContext, attention_context
from accel.exporter.patches import fixed_rotary_frequencies, mpnet_attention_by_name
from accel.exporter.tracer import probe_layers, trace_decoder
from tests.exporter.models import make_config, make_decoder

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
    "short_factor": [1.5] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip


@pytest.fixture
def mpnet() -> MPNetModel:
    torch.manual_seed(0)
    return MPNetModel(make_config("mpnet", pad_token_id=1)).eval()


def test_mpnet_still_computes_its_attention_inline(mpnet: MPNetModel) -> None:
    context = AttentionContext(causal=False)
    with torch.inference_mode(), attention_context(mpnet, PROBE, context):
        mpnet(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones((1, 2), dtype=torch.long))
    assert context.layers == []
    assert len(probe_layers(mpnet, "encoder")) == 2


def test_mpnet_gives_the_same_numbers_by_name(mpnet: MPNetModel) -> None:
    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, bias: Any
    ) -> tuple[torch.Tensor, None]:
        weights = (query @ key.transpose(-1, -2) * scaling + bias).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("accel_test_plain", attend)
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    with torch.inference_mode():
        expected = mpnet(input_ids=ids).last_hidden_state
        with (
            attention_context(mpnet, "accel_test_plain", AttentionContext(causal=False)),
            mpnet_attention_by_name(mpnet),
        ):
            found = mpnet(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert not hasattr(mpnet.encoder.layer[0].attention.attn, "config")


def test_dynamic_frequencies_still_branch_on_data() -> None:
    model: Any = make_decoder(rope_parameters=DYNAMIC)
    rotary, inputs = model.model.rotary_emb, (torch.zeros(1, 4, 32), torch.arange(4)[None])
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(rotary, inputs)
    with fixed_rotary_frequencies(model):
        torch.export.export(rotary, inputs)
    assert rotary.rope_type == "dynamic"


@pytest.mark.parametrize(("family", "rope"), [("llama", DYNAMIC), ("phi3", LONGROPE)])
def test_schemes_of_changing_frequencies_are_traced_and_leave_the_model_whole(
    family: str, rope: dict[str, Any]
) -> None:
    changes = {"original_max_position_embeddings": 32} if family == "phi3" else {}
    model: Any = make_decoder(family, rope_parameters=rope, **changes)
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    graph = trace_decoder(model, probe_layers(model, "decoder"))
    assert sum(node.op_type == "CachedAttention" for node in graph.graph) == 2
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert model.model.rotary_emb.rope_type == rope["rope_type"]


def test_without_its_patch_mpnet_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, mpnet: MPNetModel) -> None:
    monkeypatch.setattr("accel.exporter.tracer.mpnet_attention_by_name", nullcontext)
    with pytest.raises(UnsupportedArchitectureError, match="past transformers' attention registry"):
        probe_layers(mpnet, "encoder")


@pytest.mark.parametrize("fails", [False, True])
def test_mpnet_is_restored(mpnet: MPNetModel, fails: bool) -> None:
    assert "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(modeling_mpnet), "mpnet_attention_by_name can go"
    original = modeling_mpnet.MPNetSelfAttention.forward
    with suppress(KeyboardInterrupt), mpnet_attention_by_name(mpnet):
        assert modeling_mpnet.MPNetSelfAttention.forward is not original
        if fails:
            raise KeyboardInterrupt
    assert modeling_mpnet.MPNetSelfAttention.forward is original
    attention = [module for module in mpnet.modules() if isinstance(module, modeling_mpnet.MPNetSelfAttention)]
    assert len(attention) == 2 and not any("config" in vars(module) for module in attention)
