"""A small made-up bundle, for tests of the directory itself."""

from __future__ import annotations

from pathlib import Path

from accel.bundle import Bundle, BundleWriter
from accel.manifest import GraphEntry, Manifest, ParameterEntry, Variant
from accel.spec import ArchSpec, AttentionSpec, TensorSpec

ARCH = ArchSpec(
    family="bert",
    architecture="BertModel",
    kind="encoder",
    task="feature-extraction",
    hidden_size=8,
    vocab_size=16,
    max_positions=32,
    parameters=4,
    tied_embeddings=False,
    layers=(AttentionSpec(2, 2, 4, 0.5),),
)
GRAPH = GraphEntry("g.onnx", 20, (TensorSpec("input_ids", "int64", ("batch", "seq")),), (), ("attn.0",))


def manifest(source: str = "test") -> Manifest:
    return Manifest(
        schema_version=1,
        accel_version="0",
        source=source,
        arch=ARCH,
        variants={"fp32": Variant("float32", ("fp32.weights",), {"ort-cpu": GRAPH})},
        files={},
        versions={"torch": "2"},
        parameters={"w": ParameterEntry("fp32.weights", 0, (2, 2), "float32")},
    )


def write_files(folder: Path, weight: bytes = b"\1" * 16) -> None:
    (folder / "g.onnx").write_bytes(b"graph")
    (folder / "fp32.weights").write_bytes(weight)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


def write(out: Path, overwrite: bool = False, source: str = "test") -> Bundle:
    with BundleWriter(out, overwrite) as writer:
        write_files(writer.path)
        return writer.commit(manifest(source))
