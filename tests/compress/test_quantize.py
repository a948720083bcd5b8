from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.compress.calibrate import feeds_of
from accel.compress.layers import find_layers
from accel.compress.plan import plan
from accel.compress.quantize import quantize_graph
from accel.compress.texts import Calibration
from accel.errors import InputError
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.quantized import quantized_of
from accel.graph.quantized_nodes import spell_quantized
from accel.scheme import parse_scheme
from accel.spec import ArchSpec
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
    result, report = quantize_graph(model, arch, parse_scheme("w4g64"), head_bits=4)
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


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_bad_numbers_of_a_norm_are_named_too(bundle_of: Get, algorithm: str) -> None:
    """It is no layer that is rounded: the layer behind it would be blamed, or with rtn nothing said."""
    model, arch = canonical(bundle_of("olmo2"))
    value = model.graph.initializers["model.layers.1.post_attention_layernorm.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.full(64, np.inf, np.float32), name=value.name)
    with pytest.raises(InputError, match="64 of 64 weights are NaN.*at model.layers.1.post_attention_layernorm"):
        quantize_graph(model, arch, parse_scheme("w8g32"), algorithm, sample(arch))


class Told:
    """Notes each stage as (name, total, what was done of it)."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None, int]] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append((name, total, 0))

    def advance(self, count: int) -> None:
        name, total, done = self.stages.pop()
        self.stages.append((name, total, done + count))


@pytest.mark.parametrize(
    "scheme,family,head_bits,stages",
    [
        ("w8g32", "olmo2", None, ["Quantising"]),
        ("w8a8-dyn", "bert", None, ["Measuring channels", "Quantising"]),
        ("w4g32", "olmo2", None, ["Measuring the head in 4 bits", "Quantising"]),
        ("w4g32", "gemma2", 4, ["Measuring the head's inputs", "Quantising"]),
    ],
)
def test_progress_is_told(
    bundle_of: Get, scheme: str, family: str, head_bits: int | None, stages: list[str]
) -> None:
    """Every stage knows how much there is to do, and all of it is told."""
    model, arch = canonical(bundle_of(family))
    told = Told()
    quantize_graph(model, arch, parse_scheme(scheme), calibration=sample(arch), head_bits=head_bits, progress=told)
    assert [name for name, *_ in told.stages] == stages
    assert all(done == total for _, total, done in told.stages), told.stages


def sample(arch: ArchSpec, tokens: int = 48, count: int = 12) -> Calibration:
    generator = np.random.default_rng(5)
    return Calibration("given", tuple(generator.integers(3, arch.vocab_size, tokens) for _ in range(count)))


def outputs(model: ir.Model, arch: ArchSpec) -> NDArray[np.float32]:
    ids = np.random.default_rng(99).integers(3, arch.vocab_size, 40)
    found = TorchGraph(model).run(feeds_of(model, arch, ids, logits=True))
    return found["logits" if arch.kind == "decoder" else "last_hidden_state"]


def difference(found: NDArray, expected: NDArray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "modernbert"])
@pytest.mark.parametrize("algorithm", ["gptq", "awq+gptq"])
def test_calibrated_four_bits_beat_rounding(family: str, algorithm: str, bundle_of: Get) -> None:
    model, arch = canonical(bundle_of(family))
    scheme, calibration = parse_scheme("w4g32"), sample(arch)
    expected = outputs(model, arch)
    plain, plain_report = quantize_graph(model, arch, scheme, "rtn", head_bits=8)
    result, report = quantize_graph(model, arch, scheme, algorithm, calibration, head_bits=8)
    assert difference(outputs(result, arch), expected) < 0.97 * difference(outputs(plain, arch), expected)
    assert report.algorithm == algorithm and report.error_of == "outputs"
    assert (report.calibration_tokens, report.calibration_sha256) == (calibration.tokens, calibration.sha256)
    assert {layer.name for layer in report.layers} == {layer.name for layer in plain_report.layers}
    assert report.bytes_after == plain_report.bytes_after


def test_errors_are_those_of_the_layers_outputs(bundle_of: Get) -> None:
    """Of the first product, whose input comes straight from the table."""
    model, arch = canonical(bundle_of("olmo2"))
    calibration = sample(arch, count=3)
    result, report = quantize_graph(model, arch, parse_scheme("w4g32"), "gptq", calibration, keep={"*embed*": 32})
    name = "model.layers.0.self_attn.q_proj.weight"
    arrays = {key: model.graph.initializers[key].const_value.numpy() for key in (name, "model.embed_tokens.weight")}  # type: ignore[union-attr]
    inputs = arrays["model.embed_tokens.weight"][np.concatenate(calibration.samples)]
    after = result.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
    expected = difference(inputs @ after.T, inputs @ arrays[name].T)
    found = next(layer.error for layer in report.layers if layer.name == name)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_same_bytes_twice(family: str, bundle_of: Get) -> None:
    model, arch = canonical(bundle_of(family))
    results = [quantize_graph(model, arch, parse_scheme("w4g32"), "awq+gptq", sample(arch)) for _ in range(2)]
    (first, report), (second, again) = results
    assert report == again
    for name, value in first.graph.initializers.items():
        a, b = value.const_value, second.graph.initializers[name].const_value
        assert a is not None and b is not None and a.numpy().tobytes() == b.numpy().tobytes(), name


@pytest.mark.parametrize("variant", ["w8a8", "w8a8-dyn"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rounded_inputs(family: str, variant: str, bundle_of: Get) -> None:
    model, arch = canonical(bundle_of(family))
    scheme, calibration = parse_scheme(variant), sample(arch)
    expected = outputs(model, arch)
    errors = {}
    for algorithm in ("rtn", "smoothquant", "smoothquant+gptq", "auto"):
        result, report = quantize_graph(model, arch, scheme, algorithm, calibration)
        products = [layer for layer in report.layers if layer.role != "table"]
        assert report.input_scales.keys() == ({layer.name for layer in products} if variant == "w8a8" else set())
        spell_quantized(result, scheme.activations, report.input_scales)
        errors[algorithm] = difference(outputs(result, arch), expected)
    assert report.algorithm == "smoothquant+gptq" and errors["auto"] == errors["smoothquant+gptq"] < 0.2
    assert max(errors["smoothquant"], errors["auto"]) < 1.1 * errors["rtn"]


def test_products_of_one_input_share_its_step(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("llama"))
    _, report = quantize_graph(model, arch, parse_scheme("w8a8"), "rtn", sample(arch))
    steps = [report.input_scales[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert len(set(steps)) == 1 and steps[0] > 0


def test_head_of_a_decoder(bundle_of: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets 8 bits where 4 cost more than they may, unless it is told otherwise."""
    model, arch = canonical(bundle_of("olmo2"))
    scheme, calibration = parse_scheme("w4g32"), sample(arch)
    for allowed, wanted, found in ((-9.0, None, 8), (9.0, None, 4), (-9.0, 4, 4), (9.0, 8, 8)):
        monkeypatch.setattr("accel.compress.quantize.HEAD_DROP", allowed)
        _, report = quantize_graph(model, arch, scheme, "rtn", calibration, head_bits=wanted)
        assert next(layer.bits for layer in report.layers if layer.role == "head") == found
        if wanted is None:
            told = re.fullmatch(rf"head in {found} bits: .* costs (-?\d\.\d+) of Q, .*", report.notes[0])
            assert told and 0 < abs(float(told[1])) < 1
    _, report = quantize_graph(model, arch, scheme)
    assert report.notes == ("head in 8 bits: there is no text to measure 4 bits on",) and report.algorithm == "rtn"


def test_algorithms_that_do_not_fit(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("olmo2"))
    calibration = sample(arch)
    wrong = [
        ("w4g32", "gtpq", calibration, "unknown algorithm 'gtpq'.*gptq"),
        ("w4g32", "smoothquant", calibration, "smoothquant does not fit w4g32, which rounds no inputs.*gptq or awq"),
        ("w8a8-dyn", "awq", calibration, "awq does not fit w8a8-dyn, which rounds its inputs too.*smoothquant"),
        ("w4g32", "gptq", None, "gptq needs calibration text"),
        ("w8a8", "auto", None, "w8a8 needs calibration text.*w8a8-dyn"),
    ]
    for variant, algorithm, given, message in wrong:
        with pytest.raises(InputError, match=message):
            quantize_graph(model, arch, parse_scheme(variant), algorithm, given)


def test_a_model_that_gives_no_numbers_is_named(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("olmo2"))
    value = model.graph.initializers["model.layers.1.post_attention_layernorm.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.full(64, 3e38, np.float32), name=value.name)  # overflows
    for algorithm in ("gptq", "awq", "awq+gptq"):
        with pytest.raises(InputError, match="NaN or infinity among the inputs.*model.layers.1.mlp"):
            quantize_graph(model, arch, parse_scheme("w4g32"), algorithm, sample(arch), head_bits=8)
    with pytest.raises(InputError, match="NaN or infinity among the inputs.*model.layers.1.mlp"):
        quantize_graph(model, arch, parse_scheme("w8a8"), "smoothquant", sample(arch))
