from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from accel.bundle import ITEM_BYTES, Bundle
from accel.inspection import inspect
from accel.inspection.graph_file import StoredTensor
from accel.inspection.report import WeightShare
from accel.inspection.weights import count_weights, part_of
from accel.manifest import FileEntry, Variant
from tests.inspection import decoder_bundle as made


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("embeddings.word_embeddings.weight", "embedding"),
        ("embeddings.LayerNorm.bias", "norm"),
        ("transformer.wte.weight", "embedding"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("transformer.ln_f.bias", "norm"),
        ("transformer.h.3.attn.c_attn.bias", "attention"),
        ("transformer.h.3.mlp.c_proj.weight", "mlp"),
        ("model.layers.11.self_attn.q_norm.weight", "norm"),
        ("model.layers.11.post_attention_layernorm.weight", "norm"),
        ("model.layers.11.self_attn.o_proj.weight", "attention"),
        ("model.layers.11.mlp.gate_up_proj.weight", "mlp"),
        ("encoder.layer.0.attention.output.dense.weight", "attention"),
        ("encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
        ("encoder.layer.0.intermediate.dense.weight", "mlp"),
        ("encoder.layer.0.output.dense.bias", "mlp"),
        ("encoder.relative_attention_bias.weight", "attention"),
        ("layers.0.qkv.weight", "attention"),
        ("transformer.layer.0.attention.q_lin.weight", "attention"),
        ("transformer.layer.0.ffn.lin1.weight", "mlp"),
        ("transformer.layer.0.sa_layer_norm.weight", "norm"),
        ("layers.4.attn.Wqkv.weight", "attention"),
        ("layers.4.mlp.Wi.weight", "mlp"),
        ("layers.4.mlp_norm.weight", "norm"),
        ("lm_head.weight", "head"),
        ("classifier.bias", "head"),
        ("cls.predictions.transform.dense.weight", "head"),
        ("pooler.dense.weight", "head"),
        ("decoder.bias", "head"),
        ("decoder.layers.0.mlp.fc1.weight", "mlp"),
        ("rotary.0.cos", "other"),
        ("", "other"),
    ],
)
def test_part_of(name: str, part: str) -> None:
    assert part_of(name) == part


def test_shares(tmp_path: Path) -> None:
    report = inspect(made.write(tmp_path / "b")).weights[0]
    assert report.parts == {
        "embedding": WeightShare(1, 320, 1280),
        "attention": WeightShare(4, 1024, 4096),  # the merged initializer adds nothing
        "mlp": WeightShare(2, 256, 1024),
        "norm": WeightShare(1, 32, 128),
        "other": WeightShare(1, 64, 256),  # the table that only the graph refers to
    }
    assert list(report.parts) == ["embedding", "attention", "mlp", "norm", "other"]
    assert report.formats == {"float32": WeightShare(9, 1696, 6784)}
    assert (report.referenced_bytes, report.file_bytes) == (6784, 6784 + 64)
    groups = {group.name: group.share for group in report.groups}
    assert groups["model.layers.*.mlp.up_proj.weight"] == WeightShare(2, 256, 1024)
    assert report.groups[0].share.bytes == max(share.bytes for share in groups.values())


def test_overlapping_references_count_once() -> None:
    manifest = made.manifest(files={made.WEIGHTS: FileEntry(1000, "")}, parameters={})
    stored = [
        StoredTensor("a", made.WEIGHTS, 0, 100, 25, "float32"),
        StoredTensor("b", made.WEIGHTS, 40, 100, 50, "float16"),  # 60 bytes of its own
        StoredTensor("c", made.WEIGHTS, 50, 20, 20, "int8"),  # none
        StoredTensor("d", made.WEIGHTS, 200, 8, 1, "int64"),
    ]
    report = count_weights(manifest, "fp32", stored)
    assert report.referenced_bytes == 100 + 40 + 8
    assert {name: share.bytes for name, share in report.formats.items()} == {"float32": 100, "float16": 40, "int64": 8}


def test_files_of_other_variants_count(tmp_path: Path) -> None:
    """Where graphs cannot be read, the manifest says what they read."""
    manifest = made.write(tmp_path / "b").manifest
    entry = dataclasses.replace(manifest.variants["fp32"].graphs["ort-cpu"], weights=(made.WEIGHTS,))
    reader = Variant("float32", (), {"ort-cpu": entry})
    manifest = dataclasses.replace(manifest, variants={**manifest.variants, "fp32+kv8": reader})
    report = count_weights(manifest, "fp32+kv8", [])
    assert report.files == (made.WEIGHTS,) and report.referenced_bytes > 0
    assert report == dataclasses.replace(count_weights(manifest, "fp32", []), variant="fp32+kv8")


def test_bytes_between_parameters_count_once() -> None:
    parameters = {
        name: entry for name, entry in made.manifest().parameters.items() if "up_proj" not in name
    }  # leaves 5376 to 6400 to the graph
    manifest = made.manifest(files={made.WEIGHTS: FileEntry(made.SIZE, "")}, parameters=parameters)
    stored = [StoredTensor("mlp.fused", made.WEIGHTS, 3328, 3200, 800, "float32")]
    report = count_weights(manifest, "fp32", stored)
    assert report.parts["mlp"].bytes == 1024
    assert report.referenced_bytes == made.PARAMETERS_END


@pytest.mark.parametrize("fixture", ["tiny_decoder_bundle", "minilm_bundle"])
def test_parts_sum_to_what_is_referenced(fixture: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(fixture))
    report = inspect(bundle).weights[0]
    used = bytearray(bundle.manifest.files["fp32.weights"].size)
    for entry in bundle.manifest.parameters.values():
        size = ITEM_BYTES[entry.dtype]
        for dimension in entry.shape:
            size *= dimension
        used[entry.offset : entry.offset + size] = b"\1" * size
    for graph in bundle.manifest.variants["fp32"].graphs.values():
        model = onnx.load(str(bundle.file(graph.file)), load_external_data=False)
        for tensor in model.graph.initializer:
            place = {item.key: item.value for item in tensor.external_data}
            if place:
                start, length = int(place["offset"]), int(place["length"])
                used[start : start + length] = b"\1" * length
    referenced = used.count(1)
    assert report.referenced_bytes == referenced
    assert sum(share.bytes for share in report.parts.values()) == referenced
    assert sum(share.bytes for share in report.formats.values()) == referenced
    assert sum(group.share.bytes for group in report.groups) == referenced
    assert report.file_bytes == len(used)
