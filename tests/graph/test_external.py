"""Weight files that several graphs share: nothing is written twice, and nothing wrong is taken for what it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.graph.external import LACKING, StoredTensors, read_stored, write_external
from accel.spec import PARTS

Arrays = dict[str, NDArray]
RNG = np.random.default_rng(0)
QKV: Arrays = {name: RNG.standard_normal((rows, 64)).astype(np.float16) for name, rows in zip("qkv", (64, 32, 32))}
MERGED = np.concatenate(list(QKV.values()))


def graph(arrays: Arrays, parts: dict[str, str] | None = None) -> ir.Model:
    """A graph that only holds initializers; ``parts``: what merged ones are made of."""
    values = []
    for name, array in arrays.items():
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        value.metadata_props.update({PARTS: "\n".join(parts[name])} if parts and name in parts else {})
        values.append(value)
    made = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23}, name="main")
    return ir.Model(made, ir_version=10)


def write(folder: Path, name: str, model: ir.Model, *before: str) -> int:
    """Writes one graph and its weights beside those written before; returns the bytes that took."""
    stored = StoredTensors(folder / f"{other}.onnx" for other in before)
    written = write_external(model, folder / f"{name}.weights", stored=stored)
    ir.save(model, folder / f"{name}.onnx")
    return written


def read(folder: Path, name: str) -> Arrays:
    found = ir.load(folder / f"{name}.onnx").graph.initializers
    return {key: np.array(value.const_value.numpy()) for key, value in found.items()}  # type: ignore[union-attr]


def check(folder: Path, name: str, arrays: Arrays) -> None:
    found = read(folder, name)
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, strict=True)


def test_equal_tensors_are_written_once(tmp_path: Path) -> None:
    more = RNG.standard_normal((8, 128)).astype(np.float16)
    assert write(tmp_path, "first", graph(QKV)) == MERGED.nbytes
    assert write(tmp_path, "second", graph({**QKV, "more": more}), "first") == more.nbytes
    check(tmp_path, "second", {**QKV, "more": more})
    assert (tmp_path / "second.weights").stat().st_size == more.nbytes


def test_nothing_new_makes_no_file(tmp_path: Path) -> None:
    write(tmp_path, "first", graph(QKV))
    assert write(tmp_path, "second", graph(QKV), "first") == 0
    assert not (tmp_path / "second.weights").exists()


@pytest.mark.parametrize("bias", [False, True], ids=["", "vectors between"])
def test_parts_and_then_their_merger(tmp_path: Path, bias: bool) -> None:
    """Also where each projection's bias stands behind its weight."""
    vectors = {f"{name}.bias": RNG.standard_normal(1024).astype(np.float16) for name in QKV} if bias else {}
    apart: Arrays = {}
    for name, array in QKV.items():
        apart |= {name: array} | {key: value for key, value in vectors.items() if key.startswith(name)}
    write(tmp_path, "apart", graph(apart))
    merged = {"qkv": MERGED} | ({"bias": np.concatenate(list(vectors.values()))} if bias else {})
    parts = {"qkv": "qkv"} | ({"bias": list(vectors)} if bias else {})
    assert write(tmp_path, "merged", graph(merged, parts), "apart") == 0  # type: ignore[arg-type]
    check(tmp_path, "merged", merged)


def test_a_merger_and_then_its_parts(tmp_path: Path) -> None:
    write(tmp_path, "merged", graph({"qkv": MERGED}, {"qkv": "qkv"}))
    assert write(tmp_path, "apart", graph(QKV), "merged") == 0
    check(tmp_path, "apart", QKV)


@pytest.mark.parametrize("changed", ["numbers", "type", "shape"])
def test_what_only_has_the_name_is_written(tmp_path: Path, changed: str) -> None:
    write(tmp_path, "first", graph(QKV))
    other = {"numbers": QKV["q"] + 1, "type": QKV["q"].astype(np.float32), "shape": QKV["q"][:32]}[changed]
    assert write(tmp_path, "second", graph({"q": other}), "first") == other.nbytes
    check(tmp_path, "second", {"q": other})


def test_parts_in_another_order_are_written(tmp_path: Path) -> None:
    write(tmp_path, "apart", graph({name: QKV[name] for name in "qvk"}))
    assert write(tmp_path, "merged", graph({"qkv": MERGED}, {"qkv": "qkv"}), "apart") == MERGED.nbytes
    check(tmp_path, "merged", {"qkv": MERGED})


def test_parts_without_their_siblings_are_written(tmp_path: Path) -> None:
    """Where a part lies in a merged tensor is known from the sizes of those before it."""
    write(tmp_path, "merged", graph({"qkv": MERGED}, {"qkv": "qkv"}))
    assert write(tmp_path, "alone", graph({"k": QKV["k"]}), "merged") == QKV["k"].nbytes
    check(tmp_path, "alone", {"k": QKV["k"]})


def test_the_third_graph_finds_both(tmp_path: Path) -> None:
    more = RNG.standard_normal((8, 128)).astype(np.float16)
    write(tmp_path, "first", graph(QKV))
    write(tmp_path, "second", graph({**QKV, "more": more}), "first")
    assert write(tmp_path, "third", graph({**QKV, "more": more}), "first", "second") == 0
    check(tmp_path, "third", {**QKV, "more": more})


def test_a_file_is_read_for_nearly_all_or_nothing(tmp_path: Path) -> None:
    """What a cache adds may lie elsewhere; a few equal tensors hold no file."""
    write(tmp_path, "first", graph(QKV))
    scales = RNG.standard_normal(1024 // 8)
    large = {f"large.{name}": RNG.standard_normal((512, 64)).astype(np.float16) for name in "ab"}
    assert scales.nbytes * LACKING < MERGED.nbytes * 8 < sum(array.nbytes for array in large.values()) * LACKING
    write(tmp_path, "large", graph(large))
    made = graph({**large, "scales": scales})
    assert read_stored(made, tmp_path / "large.onnx")
    assert write_external(made, tmp_path / "most.weights", stored=StoredTensors([tmp_path / "large.onnx"])) == 1024
    ir.save(made, tmp_path / "most.onnx")
    check(tmp_path, "most", {**large, "scales": scales})
    for other in ({**QKV, "q": QKV["q"] + 1}, {**QKV, **large}):
        made = graph(other)
        assert not read_stored(made, tmp_path / "first.onnx")
        assert all(not isinstance(value.const_value, ir.ExternalTensor) for value in made.graph.initializers.values())
