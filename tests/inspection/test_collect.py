from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.errors import BundleError
from accel.inspection import inspect, render_page, render_text
from accel.inspection.report import CacheRow
from accel.manifest import GraphEntry, ParityResult, Variant
from tests.inspection import decoder_bundle as made


def test_attention_of_every_layer(tmp_path: Path) -> None:
    found = inspect(made.write(tmp_path / "b"))
    assert found.warnings == () and found.left_out == ()
    canonical, lowered = found.graphs
    assert (canonical.target, lowered.target) == ("canonical", "ort-cpu")
    first, second = lowered.attention
    assert (first.op, first.branch) == ("com.microsoft::GroupQueryAttention", None)
    assert (first.rotary, first.packed_qkv, first.window, first.softcap) == ("inside", True, 16, None)
    assert (second.rotary, second.packed_qkv, second.window, second.softcap) == ("outside", False, None, 30.0)
    assert (second.heads, second.kv_heads, second.head_dim, second.causal) == (4, 2, 8, True)


def test_nodes_and_operators(tmp_path: Path) -> None:
    graph = inspect(made.write(tmp_path / "b")).graphs[1]
    assert graph.nodes is not None
    assert (graph.nodes.top, graph.nodes.inner, graph.nodes.functions) == (7, 0, 0)
    assert graph.nodes.operators == {
        "MatMul": 2, "com.microsoft::GroupQueryAttention": 2, "Gather": 1, "Reshape": 1,
        "com.microsoft::RotaryEmbedding": 1,
    }  # fmt: skip
    assert next(iter(graph.nodes.operators.values())) == 2
    assert [(item.nodes_before, item.nodes_after) for item in graph.passes] == [(100, 80), (80, 30), (30, 12)]


def test_cache_sizes(tmp_path: Path) -> None:
    cache = inspect(made.write(tmp_path / "b")).cache
    assert cache is not None
    assert cache.bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, key and value, kv heads, head size, float32
    assert cache.shapes == (("rows", 2, "capacity", 8),) * 2
    assert cache.rows == (CacheRow(1024, 1024 * 256), CacheRow(2048, 2048 * 256))


def with_caches(dtype: str, width: int = 8) -> GraphEntry:
    """The graph's entry, with caches of another type."""
    plain = made.entry("ort-cpu", ())
    inputs = tuple(
        dataclasses.replace(spec, dtype=dtype, shape=("B", 2, "C", width)) if spec.name.startswith("past.") else spec
        for spec in plain.inputs
    )
    return dataclasses.replace(plain, inputs=inputs)


def test_caches_of_every_type(tmp_path: Path) -> None:
    half, whole = with_caches("float16"), with_caches("float32")
    variants = {
        **made.manifest().variants,
        "fp16": Variant("float16", (made.WEIGHTS,), {"tensorrt": half, "cuda": half}),
        "fp16+kv8": Variant("float16", (made.WEIGHTS,), {"cuda": with_caches("int8")}),
        "w4g32": Variant("float32", (made.WEIGHTS,), {"ort-cpu": whole, "cuda": half}),
    }
    found = inspect(made.write(tmp_path / "b", variants=variants))
    assert found.cache is not None
    assert found.cache.kinds == (
        ("float32", 256, ("fp32", "w4g32 for ort-cpu")),
        ("float16", 128, ("fp16", "w4g32 for cuda")),
        ("int8", 64, ("fp16+kv8",)),
    )
    assert "  float16, 128 bytes per token: fp16, w4g32 for cuda" in render_text(found).splitlines()
    assert "float16, 128 bytes per token: fp16, w4g32 for cuda." in render_page(found)
    alone = render_text(inspect(made.write(tmp_path / "alone")))
    assert "Cache: float32, 256 bytes per token of a row" in alone and "per token: fp32" not in alone


def test_rounded_caches_of_other_variants(tmp_path: Path) -> None:
    small = with_caches("uint8", 4)
    variants = {**made.manifest().variants, "fp32+kv4": Variant("float32", (made.WEIGHTS,), {"ort-cpu": small})}
    found = inspect(made.write(tmp_path / "b", variants=variants))
    assert found.cache is not None and found.cache.dtype == "float32"
    assert found.cache.rounded == (("fp32+kv4", "int4", 32),)
    assert "  int4, 32 bytes per token: fp32+kv4" in render_text(found).splitlines()
    assert "int4, 32 bytes per token: fp32+kv4." in render_page(found)


def test_capacities_below_the_usual_ones(tmp_path: Path) -> None:
    cache = inspect(made.write(tmp_path / "b", arch=dataclasses.replace(made.ARCH, max_positions=100))).cache
    assert cache is not None and cache.rows == (CacheRow(100, 25600),)


def test_encoders_have_no_cache(tmp_path: Path) -> None:
    arch = dataclasses.replace(made.ARCH, kind="encoder", task="feature-extraction")
    assert inspect(made.write(tmp_path / "b", arch=arch)).cache is None


def test_a_missing_attention_node_is_reported(tmp_path: Path) -> None:
    found = inspect(made.write(tmp_path / "b", made.nodes()[:-1]))
    assert len(found.warnings) == 2 and "no attention node 'layers.1.attention' (layer 1)" in found.warnings[0]
    assert found.graphs[0].attention[1].op is None


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("local_window_size", -1, "local_window_size None, the manifest says window 16"),
        ("softcap", 5.0, "softcap 5.0, the manifest says softcap None"),
        ("num_heads", 8, "num_heads 8, the manifest says heads 4"),
        ("scale", 0.25, "scale 0.25, the manifest says scale 0.5"),
    ],
)
def test_a_node_that_disagrees_with_the_manifest(tmp_path: Path, attribute: str, value: float, said: str) -> None:
    found = inspect(made.write(tmp_path / "b", made.nodes(**{attribute: value})))
    assert len(found.warnings) == 2 and "layer 0" in found.warnings[0]
    assert said in found.warnings[0]


def test_references_outside_the_weights_are_reported(tmp_path: Path) -> None:
    beyond = made.external("beyond", made.SIZE, (4,))
    foreign = made.external("foreign", 0, (4,))
    foreign.external_data[0].value = "../secret"
    found = inspect(made.write(tmp_path / "b", extra=(beyond, foreign)))
    assert any("'beyond' lies outside 'fp32.weights'" in warning for warning in found.warnings)
    assert any("'foreign' lies in '../secret', no weight file" in warning for warning in found.warnings)


def test_parity_that_failed_or_is_missing_is_reported(tmp_path: Path) -> None:
    bad = ParityResult("torch eager fp32", 3, 1.0, 0.5, 1e-4)
    assert "exceeds" in inspect(made.write(tmp_path / "bad", parity={"fp32/ort-cpu": bad})).warnings[0]
    assert "No parity result" in inspect(made.write(tmp_path / "none", parity={})).warnings[0]


def test_without_onnx_the_manifest_still_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = made.write(tmp_path / "b")
    whole = inspect(bundle)
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = inspect(bundle)
    assert len(found.left_out) == 1 and "pip install onnx" in found.left_out[0]
    assert found.warnings == ()
    assert all(graph.nodes is None and graph.attention[0].op is None for graph in found.graphs)
    assert found.graphs[1].attention[0].window == 16
    assert found.weights[0].referenced_bytes == made.PARAMETERS_END  # all but the table that only the graph knows
    assert found.cache == whole.cache and found.graphs[1].passes == whole.graphs[1].passes
    text, page = render_text(found), render_page(found)
    assert "pip install onnx" in text and "pip install onnx" in page
    assert "not read" in text and "not read" in page
    assert json.loads(found.to_json())["graphs"][1]["nodes"] is None


def test_junk_instead_of_a_graph(tmp_path: Path) -> None:
    path = tmp_path / "b"
    made.write(path)
    (path / "ort-cpu.onnx").write_bytes(b"\xff" * (path / "ort-cpu.onnx").stat().st_size)
    with pytest.raises(BundleError, match="not an ONNX graph.*ort-cpu"):
        inspect(Bundle.open(path))


def test_numbers_that_no_bundle_has(tmp_path: Path) -> None:
    bundle = made.write(tmp_path / "b", arch=dataclasses.replace(made.ARCH, parameters=10**400))
    with pytest.raises(BundleError, match="out of range.*parameters"):
        inspect(bundle)


def test_json_holds_everything(tmp_path: Path) -> None:
    found = json.loads(inspect(made.write(tmp_path / "b")).to_json())
    assert found["arch"]["parameters"] == 1600
    assert found["graphs"][1]["attention"][0]["rotary"] == "inside"
    assert found["weights"][0]["parts"]["attention"]["bytes"] == 2048 + 2048
    assert found["parity"]["fp32/ort-cpu"]["limit"] == 1e-4
    assert found["cache"]["bytes_per_token"] == 256
    assert found["files"][0].keys() == {"name", "size", "sha256"}


def test_a_real_decoder(tiny_decoder_bundle: Path) -> None:
    found = inspect(Bundle.open(tiny_decoder_bundle))
    assert found.warnings == () and found.left_out == ()
    lowered = next(graph for graph in found.graphs if graph.target == "ort-cpu")
    assert [layer.op for layer in lowered.attention] == ["com.microsoft::GroupQueryAttention"] * 2
    assert [layer.rotary for layer in lowered.attention] == ["inside"] * 2
    assert all(layer.packed_qkv for layer in lowered.attention)
    canonical = next(graph for graph in found.graphs if graph.target == "canonical")
    assert [layer.op for layer in canonical.attention] == ["accel::CachedAttention"] * 2
    assert [layer.rotary for layer in canonical.attention] == ["outside"] * 2
    for graph in found.graphs:
        assert graph.nodes is not None and graph.passes[-1].nodes_after == graph.nodes.top


def test_a_real_encoder(minilm_bundle: Path) -> None:
    found = inspect(Bundle.open(minilm_bundle))
    assert found.warnings == () and found.left_out == () and found.cache is None
    lowered = next(graph for graph in found.graphs if graph.target == "ort-cpu")
    kernels = {(layer.op, layer.branch, layer.heads, layer.rotary) for layer in lowered.attention}
    assert (
        kernels == {("Attention / com.microsoft::MultiHeadAttention", "If", 12, "none")} and len(lowered.attention) == 6
    )
    parts = found.weights[0].parts
    # six layers of four 384 x 384 projections with biases, and of two 384 x 1536 ones
    assert parts["attention"].elements == 6 * 4 * (384 * 384 + 384)
    assert parts["mlp"].elements == 6 * (2 * 384 * 1536 + 1536 + 384)
    assert parts["norm"].elements == 13 * 2 * 384


def test_types_of_matrices(tmp_path: Path) -> None:
    plain = made.manifest().variants["fp32"]
    names = ("fp32", "fp32+kv4", "w8a8-dyn", "w4g32", "w4g128+kv8", "of a later accel")
    found = inspect(made.write(tmp_path / "b", variants=dict.fromkeys(names, plain)))
    types = ("float32", "float32", "int8", "int4", "int4", "float32")
    assert found.variants == dict(zip(names, types, strict=True))
