from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from accel.errors import ExportError, UnsupportedArchitectureError
from accel.exporter.tracer import (
    OPSET,
    probe_layers,
    takes_token_types,
    trace_decoder,
    trace_encoder,
)

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 11,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    config = AutoConfig.for_model("llama", **SMALL, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def decoder(llama: Any) -> ir.Model:
    return trace_decoder(llama, probe_layers(llama, "decoder"))


def bert(**changes: Any) -> Any:
    config = AutoConfig.for_model("bert", **{**SMALL, **changes})
    return AutoModel.from_config(config, attn_implementation="eager").eval()


def dims(values: list[ir.Value]) -> dict[str, list[str]]:
    return {value.name or "": [str(size) for size in value.shape or ()] for value in values}


def test_decoder_interface(decoder: ir.Model) -> None:
    cache = ["B", "2", "C", "8"]
    inputs, outputs = dims(list(decoder.graph.inputs)), dims(list(decoder.graph.outputs))
    assert {name: inputs[name] for name in list(inputs)[:5]} == {
        "input_ids": ["T"],
        "position_ids": ["T"],
        "past_lengths": ["B"],
        "query_lengths": ["B"],
        "logits_positions": ["R"],
    }
    names = [f"{index}.{part}" for index in range(2) for part in ("key", "value")]
    assert list(inputs)[5:] == [f"past.{name}" for name in names]
    assert list(outputs) == ["logits", *(f"present.{name}" for name in names)]
    assert all(inputs[f"past.{name}"] == cache and outputs[f"present.{name}"] == cache for name in names)
    assert outputs["logits"] == ["R", "11"]


def test_attention_is_one_node_per_layer(decoder: ir.Model) -> None:
    nodes = [node for node in decoder.graph if node.domain == "accel"]
    assert [node.op_type for node in nodes] == ["CachedAttention"] * 2
    assert {name: attribute.value for name, attribute in nodes[0].attributes.items()} == {
        "num_heads": 4,
        "kv_num_heads": 2,
        "scale": pytest.approx(8**-0.5),
    }
    assert [value.name for value in nodes[1].inputs][3:] == [
        "past.1.key",
        "past.1.value",
        "past_lengths",
        "query_lengths",
    ]
    assert "Softmax" not in {node.op_type for node in decoder.graph}
    assert decoder.opset_imports[""] == OPSET


def test_head_runs_on_the_wanted_rows_only(decoder: ir.Model) -> None:
    (head,) = (value for name, value in decoder.graph.initializers.items() if name.endswith("lm_head.weight"))
    reader = next(iter(head.uses())).node
    while reader.op_type != "MatMul":
        reader = next(iter(reader.outputs[0].uses())).node
    assert "R" in [str(size) for size in reader.inputs[0].shape or ()]


def test_one_row_and_one_token_are_not_baked_in(decoder: ir.Model) -> None:
    """Sizes stay symbols even where the example could be taken for a constant."""
    for name in ("input_ids", "past_lengths", "logits_positions", "past.0.key"):
        value = next(value for value in decoder.graph.inputs if value.name == name)
        assert isinstance(value.shape[0], ir.SymbolicDim)  # type: ignore[index]


def test_the_model_is_left_as_it_was(llama: Any) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    trace_decoder(llama, probe_layers(llama, "decoder"))
    assert llama.config._attn_implementation == "eager" and not llama.training
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert llama(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 11)


def test_encoder_interface() -> None:
    model = bert()
    traced = trace_encoder(model, "feature-extraction")
    assert dims(list(traced.graph.inputs)) == {
        "input_ids": ["B", "S"],
        "attention_mask": ["B", "S"],
        "token_type_ids": ["B", "S"],
    }
    assert dims(list(traced.graph.outputs)) == {"last_hidden_state": ["B", "S", "32"]}
    nodes = [node for node in traced.graph if node.domain == "accel"]
    assert [node.op_type for node in nodes] == ["Attention"] * 2


@pytest.mark.parametrize("types,taken", [(2, True), (1, False), (0, False)])
def test_token_types_are_an_input_where_there_are_several(types: int, taken: bool) -> None:
    assert takes_token_types(bert(type_vocab_size=max(types, 1))) is taken


def test_attention_past_the_registry_is_refused() -> None:
    class Own(torch.nn.Module):
        config = AutoConfig.for_model("bert", **SMALL)

        def forward(self, **_: torch.Tensor) -> None:
            return None

    with pytest.raises(UnsupportedArchitectureError, match="past transformers' attention registry"):
        probe_layers(Own(), "encoder")  # type: ignore[arg-type]


def test_decoder_without_logits_to_keep_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="takes no logits_to_keep"):
        trace_decoder(bert(), [])


def test_a_failed_trace_names_its_cause(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = probe_layers(llama, "decoder")

    def broken(*_: Any, **__: Any) -> None:
        raise ArithmeticError("the innermost cause")

    monkeypatch.setattr(llama.model.norm, "forward", broken)
    with pytest.raises(ExportError, match="tracing failed: .*the innermost cause"):
        trace_decoder(llama, layers)
    assert llama.config._attn_implementation == "eager"
