"""Graph files and their weights: what is read, from where, and what a damaged file says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from accel.builder.parse import parse
from accel.builder.source import GraphSource
from accel.engines.tensorrt.adapter import load_flavour
from accel.errors import EngineBuildError, InputError
from tests.builder import graphs


def test_capacity_is_written_into_inputs_and_outputs(tmp_path: Path) -> None:
    source = GraphSource(graphs.save(graphs.decoder(), tmp_path), 48)
    shapes = {spec.name: (spec.dtype, spec.shape) for spec in (*source.inputs, *source.outputs)}
    assert shapes["past.0.key"] == shapes["present.0.value"] == ("float16", ("B", graphs.KV_HEADS, 48, graphs.HEAD_DIM))
    assert shapes["input_ids"] == ("int64", ("B", "S")) and shapes["logits"] == ("float32", ("R", graphs.VOCAB))


@pytest.mark.parametrize("capacity", [None, 0])
def test_decoders_need_a_capacity(tmp_path: Path, capacity: int | None) -> None:
    with pytest.raises(InputError, match="fixed number of cache slots"):
        GraphSource(graphs.save(graphs.decoder(), tmp_path), capacity)


def test_encoders_have_no_capacity(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dimension C"):
        GraphSource(graphs.save(graphs.encoder(), tmp_path), 64)


def test_weights_are_read_in_place(tmp_path: Path) -> None:
    proto = graphs.decoder("bfloat16")
    source = GraphSource(graphs.save(proto, tmp_path), 64)
    whole = (tmp_path / "weights.bin").read_bytes()
    external = {name: (address, size) for name, address, size in source.external()}
    assert 0 < sum(size for _, size in external.values()) <= source.weight_bytes
    assert sum(size for _, size in external.values()) <= len(whole) and "layers.0.q.weight" in external
    source.drop_pages()  # what was given back is read again
    weight = source.constant("layers.0.q.weight")
    assert weight is not None and weight.dtype == ml_dtypes.bfloat16
    assert weight.shape == (graphs.HIDDEN, graphs.HEADS * graphs.HEAD_DIM)
    assert weight.tobytes() in whole and float(np.abs(weight.astype(np.float32)).max()) > 0.1
    scale = source.constant("layers.0.scale.value")
    assert scale is not None and float(scale) == pytest.approx(graphs.HEAD_DIM**-0.5, rel=2**-8)
    assert source.constant("embedded") is None


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = graphs.save(graphs.decoder(), tmp_path)
    weights = tmp_path / "weights.bin"
    if damage == "missing":
        weights.unlink()
    else:
        os.truncate(weights, weights.stat().st_size - 64 if damage == "truncated" else 0)
    with pytest.raises(EngineBuildError, match=r"weights\.bin.*[Ee]xport the bundle again"):
        parse(load_flavour("rtx"), GraphSource(path, 64))


@pytest.mark.parametrize("place", ["absolute", "parent", "link", "unlisted", "nowhere"])
@pytest.mark.parametrize("listed", [True, False])
def test_weights_elsewhere_are_refused(tmp_path: Path, place: str, listed: bool) -> None:
    """The file is there and fits; it is none of the graph's."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    path = graphs.save(graphs.decoder(), folder)
    outside = Path(shutil.copy(folder / "weights.bin", tmp_path / "secret.bin"))
    (folder / "link.bin").symlink_to(outside)
    shutil.copy(outside, folder / "other.bin")
    locations = {"absolute": str(outside), "parent": "../secret.bin", "link": "link.bin", "unlisted": "other.bin"}
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = locations.get(place, "")
    path.write_bytes(proto.SerializeToString())
    source = GraphSource(path, 64, ["weights.bin"] if listed else None)
    if place == "unlisted" and not listed:
        assert list(source.external())
        return
    with pytest.raises(EngineBuildError, match=r"no weight file of its own.*model\.onnx"):
        list(source.external())


@pytest.mark.parametrize("content", [None, b"no graph at all \xff\xff"])
def test_a_damaged_graph_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineBuildError, match=r"Cannot read the graph.*model\.onnx"):
        GraphSource(path)


def test_layers_of_nodes(tmp_path: Path) -> None:
    source = GraphSource(graphs.save(graphs.decoder(windows=(None, None)), tmp_path), 64)
    assert [source.layer_index(f"layers.{index}.gate") for index in (0, 1)] == [0, 1]
    assert source.layer_of("layers.1.gate") == "layer 1" and source.layer_of("nobody") == "outside the layers"
    for name in ("seen", "embedded", "narrow", "logits"):
        assert source.layer_of(name) == "outside the layers"


def test_layers_of_nodes_without_a_name_of_their_own(tmp_path: Path) -> None:
    """Parameters tell, and what stands between them: an activation belongs to the layer whose weights are around it."""
    proto = graphs.decoder(windows=(None, None))
    names = {node.name: f"{node.op_type}_{index}" for index, node in enumerate(proto.graph.node)}
    for node in proto.graph.node:
        if not node.name.endswith((".attention", "_update", ".scale")):
            node.name = names[node.name]
    source = GraphSource(graphs.save(proto, tmp_path), 64)
    for layer in (0, 1):
        for part in ("input_norm.norm", "q", "rows", "o", "residual", "post_norm.norm", "swish", "down", "out"):
            assert source.layer_index(names[f"layers.{layer}.{part}"]) == layer, part
    assert {source.layer_index(names[name]) for name in ("embedded", "seen", "final.norm", "narrow")} == {None}


def test_what_folds_and_what_is_needed(tmp_path: Path) -> None:
    proto = graphs.decoder()
    proto.graph.node.append(graphs.helper.make_node("Neg", ["narrow"], ["nobody"], name="dead"))
    source = GraphSource(graphs.save(proto, tmp_path), 64)
    assert {"capacity", "slots.used", "cos"} <= source.folded() and "seen" not in source.folded()
    names = [node.name for node in source.needed()]
    assert "dead" not in names and names[-1] == "logits"
