"""``accel.build`` refuses a bundle whose graph is not the traced model's, or reads what is not its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from accel.bundle import file_entry
from accel.engine_build import build
from accel.errors import AccelError
from accel.variants import add_variant

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def bundle(tiny_decoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    return add_variant(shutil.copytree(tiny_decoder_bundle, tmp_path / "bundle"), "fp16", check=False).path


@dataclass(frozen=True)
class Mutation:
    """An edit of every node of one operator."""

    op: str
    edit: Callable[[Any], None]
    message: str

    def __call__(self, proto: Any) -> None:
        found = [node for node in proto.graph.node if node.op_type == self.op]
        assert found
        for node in found:
            self.edit(node)


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    def edit(node: Any) -> None:
        kept = [item for item in node.attribute if item.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def elsewhere(proto: Any) -> None:
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../bundle/" + entry.value


MUTATIONS = {
    "rotation": Mutation("RotaryEmbedding", attribute("interleaved", 1), "RotaryEmbedding interleaved 0.*as traced"),
    "epsilon": Mutation("RMSNormalization", attribute("epsilon", 1e-2), "RMSNormalization axis -1 epsilon.*as traced"),
    "causality": Mutation("LessOrEqual", lambda node: setattr(node, "op_type", "Less"), "does not see"),
}


@pytest.mark.parametrize("name", [*MUTATIONS, "weights elsewhere"])
def test_a_wrong_graph_is_not_built(bundle: Path, tmp_path: Path, name: str) -> None:
    path, manifest = bundle / "fp16.tensorrt.onnx", bundle / "manifest.json"
    proto = onnx.load(path, load_external_data=False)
    MUTATIONS.get(name, elsewhere)(proto)
    path.write_bytes(proto.SerializeToString())
    data, entry = json.loads(manifest.read_text()), file_entry(path)
    data["files"][path.name] = {"size": entry.size, "sha256": entry.sha256}  # the manifest takes it for the right one
    manifest.write_text(json.dumps(data))
    message = MUTATIONS[name].message if name in MUTATIONS else "is no weight file of its own"
    with pytest.raises(AccelError, match=message):
        build(bundle, "rtx", "sm86", capacity=64, max_batch=2, store=tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*.plan"))
