from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from accel.compress.layers import find_layers
from accel.compress.plan import plan
from accel.compress.quantize import quantize_graph
from accel.errors import InputError
from accel.graph.quantized import quantized_of
from accel.scheme import parse_scheme
from tests.compress.small import canonical

Get = Callable[[str], Path]


def test_layers_of_a_decoder(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("gemma2"))
    layers, kept = find_layers(model, arch)
    assert not kept and len(layers) == 3 * 7 + 1
    assert layers[0].name == "model.embed_tokens.weight" and layers[0].role == "tied"
    assert len(layers[0].linears) == len(layers[0].gathers) == 1
    assert {layer.role for layer in layers[1:]} == {"linear"}
    assert layers[1].shape == (128, 64) and layers[1].transposed == 1


def test_layers_of_other_forms(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("gpt2"))  # Conv1D, learned positions
    layers, kept = find_layers(model, arch)
    assert [layer.role for layer in layers] == ["tied", *["linear"] * 12]
    assert layers[1].transposed == 0 and layers[1].shape == (192, 64)
    assert list(kept) == ["transformer.wpe.weight"] and "positions" in kept["transformer.wpe.weight"]
    model, arch = canonical(bundle_of("bert_pairs"))
    layers, kept = find_layers(model, arch)
    assert layers[0].role == "table" and layers[0].name == "bert.embeddings.word_embeddings.weight"
    assert set(kept) == {
        "bert.embeddings.token_type_embeddings.weight", "bert.embeddings.position_embeddings.weight",
        "classifier.weight",
    }  # fmt: skip
    assert "5 outputs" in kept["classifier.weight"]
    model, arch = canonical(bundle_of("olmo2"))
    layers, _ = find_layers(model, arch)
    assert (layers[0].role, layers[-1].role) == ("table", "head")


def test_quantizes_what_it_says(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("gpt2"))
    result, report = quantize_graph(model, arch, parse_scheme("w4g64"))
    assert [node.op_type for node in result.graph] == [node.op_type for node in model.graph]
    assert all(quantized_of(value) is None for value in model.graph.initializers.values()), "the model stays"
    found = {name: quantized_of(value) for name, value in result.graph.initializers.items()}
    assert {name for name, item in found.items() if item is not None} == {layer.name for layer in report.layers}
    for layer in report.layers:
        item, before, after = found[layer.name], model.graph.initializers[layer.name], result.graph.initializers
        assert item is not None and item.shape == layer.shape and (item.bits, item.group) == (layer.bits, layer.group)
        assert before.const_value is not None
        weight, stands_for = before.const_value.numpy(), after[layer.name].const_value.numpy()  # type: ignore[union-attr]
        assert weight.shape == stands_for.shape
        error = np.linalg.norm(weight - stands_for) / np.linalg.norm(weight)
        assert layer.error == pytest.approx(error, rel=1e-4) and 0.01 < error < 0.15
    notes = {layer.name: layer.note for layer in report.layers}
    assert "groups of 32: 96 inputs" in notes["transformer.h.0.mlp.c_proj.weight"]
    assert report.kept.keys() == {"transformer.wpe.weight"}


def test_totals(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("olmo2"))
    _, report = quantize_graph(model, arch, parse_scheme("w8g32"))
    integers = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    scales = integers // 32
    assert report.scales == scales and sum(layer.nbytes for layer in report.layers) == integers + 2 * scales
    assert report.bytes_before - report.bytes_after == 3 * integers - 2 * scales
    assert report.bytes_before == sum(value.const_value.nbytes for value in model.graph.initializers.values())  # type: ignore[union-attr]
    assert 3 < report.ratio < 4 and report.worst(1)[0].error == max(layer.error for layer in report.layers)


def test_widths_of_single_layers(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("olmo2"))
    layers, _ = find_layers(model, arch)
    scheme = parse_scheme("w4g32")
    choices = plan(layers, scheme, {"*.down_proj.weight": 8, "model.layers.1.*": 32}, head_bits=8)
    assert choices["model.layers.0.mlp.down_proj.weight"].bits == 8
    assert choices["model.layers.1.mlp.down_proj.weight"].bits == 32
    assert choices["model.layers.0.mlp.up_proj.weight"].bits == 4
    assert choices["lm_head.weight"].bits == 8 and choices["model.embed_tokens.weight"].bits == 8
    result, report = quantize_graph(model, arch, scheme, keep={"model.layers.1.*": 32})
    assert quantized_of(result.graph.initializers["model.layers.1.mlp.up_proj.weight"]) is None
    assert report.kept["model.layers.1.mlp.up_proj.weight"] == "asked for"


def test_wrong_arguments(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("olmo2"))
    with pytest.raises(InputError, match="fp16 leaves weights as they are.*w4g32"):
        quantize_graph(model, arch, parse_scheme("fp16"))
    with pytest.raises(InputError, match="no layer is called 'lm_hed.weight'.*lm_head.weight"):
        quantize_graph(model, arch, parse_scheme("w4g32"), keep={"lm_hed.weight": 8})
    with pytest.raises(InputError, match=r"5 is no width of a weight \(at head_bits\)"):
        quantize_graph(model, arch, parse_scheme("w4g32"), head_bits=5)


def test_bad_weights_name_their_layer(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("olmo2"))
    value = model.graph.initializers["model.layers.1.mlp.up_proj.weight"]
    assert value.const_value is not None
    data = np.array(value.const_value.numpy())
    data[3, 4] = np.nan
    value.const_value = ir.tensor(data, name=value.name)
    with pytest.raises(InputError, match="1 of 6,144 weights.*at model.layers.1.mlp.up_proj.weight"):
        quantize_graph(model, arch, parse_scheme("w8g32"))


def test_progress_is_told(bundle_of: Get) -> None:
    class Told:
        def __init__(self) -> None:
            self.stages: list[tuple[str, int | None]] = []
            self.count = 0

        def stage(self, name: str, total: int | None = None) -> None:
            self.stages.append((name, total))

        def advance(self, count: int) -> None:
            self.count += count

    model, arch = canonical(bundle_of("olmo2"))
    told = Told()
    quantize_graph(model, arch, parse_scheme("w8g32"), progress=told)
    assert told.stages and told.stages[0][1] == told.count > 0
