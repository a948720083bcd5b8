"""A two-layer decoder bundle made by hand: every number that an inspection shows is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper, save_model

from accel.bundle import Bundle, BundleWriter
from accel.manifest import GraphEntry, Manifest, ParameterEntry, ParityResult, PassReport, Variant
from accel.spec import ArchSpec, AttentionSpec, TensorSpec

WEIGHTS = "fp32.weights"
LAYERS = (
    AttentionSpec(4, 2, 8, 0.5, window=16, causal=True),
    AttentionSpec(4, 2, 8, 0.5, softcap=30.0, causal=True),
)
ARCH = ArchSpec(
    family="llama",
    architecture="LlamaForCausalLM",
    kind="decoder",
    task="text-generation",
    hidden_size=32,
    vocab_size=10,
    max_positions=2048,
    parameters=1600,
    tied_embeddings=True,
    layers=LAYERS,
)
# name -> (offset, shape); 64 bytes between the last parameter and the table are padding
PARAMETERS = {
    "model.embed_tokens.weight": (0, (10, 32)),
    "model.layers.0.self_attn.q_proj.weight": (1280, (8, 32)),
    "model.layers.0.self_attn.k_proj.weight": (2304, (4, 32)),
    "model.layers.0.self_attn.v_proj.weight": (2816, (4, 32)),
    "model.layers.1.self_attn.q_proj.weight": (3328, (16, 32)),
    "model.layers.0.mlp.up_proj.weight": (5376, (4, 32)),
    "model.layers.1.mlp.up_proj.weight": (5888, (4, 32)),
    "model.norm.weight": (6400, (32,)),
}
PARAMETERS_END, TABLE, SIZE = 6528, 6592, 6592 + 256
CANONICAL = (PassReport("linear", 100, 80, {"linear": 4}), PassReport("clean", 80, 30, {"clean": 50}))
LOWERING = (PassReport("attention", 30, 12, {"GroupQueryAttention": 2, "packed_qkv": 1}, ("one layer unpacked",)),)
PARITY = ParityResult("torch eager fp32", 3, 1e-5, 2e-6, 1e-4, 40, 41)


def external(name: str, offset: int, shape: tuple[int, ...], length: int | None = None) -> TensorProto:
    """An initializer in the weight file."""
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    size = 4
    for dimension in shape:
        size *= dimension
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", size if length is None else length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def gqa(layer: int, inputs: list[str], **attributes: Any) -> Any:
    """A GroupQueryAttention node with the attributes of its layer."""
    spec = LAYERS[layer]
    given = {"num_heads": spec.heads, "kv_num_heads": spec.kv_heads, "scale": spec.scale}
    if spec.window:
        given["local_window_size"] = spec.window
    if spec.softcap:
        given["softcap"] = spec.softcap
    name = f"layers.{layer}.attention"
    outputs = [f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"]
    return helper.make_node(
        "GroupQueryAttention", inputs, outputs, name=name, domain="com.microsoft", **{**given, **attributes}
    )


def nodes(**first_attention: Any) -> list[Any]:
    """Layer 0 packed with the rotation inside, layer 1 unpacked with the rotation before it."""
    return [
        helper.make_node("Gather", ["model.embed_tokens.weight", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "layers.0.qkv.weight"], ["qkv"]),
        gqa(0, ["qkv", "", "", "past.0.key"], do_rotary=1, **first_attention),
        helper.make_node("MatMul", ["attended.0", "model.layers.1.self_attn.q_proj.weight"], ["q"]),
        helper.make_node("RotaryEmbedding", ["q", "rotary.0.cos"], ["turned"], domain="com.microsoft"),
        helper.make_node("Reshape", ["turned", "shape"], ["flat"]),
        gqa(1, ["flat", "k", "v", "past.1.key"]),
    ]


def save_graph(path: Path, graph_nodes: list[Any], extra: tuple[TensorProto, ...] = ()) -> None:
    """Writes a graph whose initializers lie in the weight file, but for one small constant."""
    initializers = [external(name, offset, shape) for name, (offset, shape) in PARAMETERS.items()]
    initializers += [
        external("layers.0.qkv.weight", 1280, (16, 32)),  # query, key and value of layer 0 together
        external("rotary.0.cos", TABLE, (16, 4)),
        helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 32]),
        *extra,
    ]
    graph = helper.make_graph(graph_nodes, "main", [], [], initializers)
    save_model(helper.make_model(graph), str(path))


def entry(target: str, passes: tuple[PassReport, ...]) -> GraphEntry:
    """The manifest's entry of a graph."""
    caches = [f"{{}}.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    shape: tuple[int | str, ...] = ("B", 2, "C", 8)
    return GraphEntry(
        file=f"{target}.onnx",
        opset=23,
        inputs=(
            TensorSpec("input_ids", "int64", ("T",)),
            *(TensorSpec(name.format("past"), "float32", shape) for name in caches),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("R", 10)),
            *(TensorSpec(name.format("present"), "float32", shape) for name in caches),
        ),
        attention_nodes=("layers.0.attention", "layers.1.attention"),
        passes=passes,
    )


def manifest(**changes: Any) -> Manifest:
    """The bundle's manifest."""
    graphs = {"canonical": entry("canonical", CANONICAL), "ort-cpu": entry("ort-cpu", (*CANONICAL, *LOWERING))}
    whole = Manifest(
        schema_version=1,
        accel_version="0.1.0",
        source="models/tiny",
        arch=ARCH,
        variants={"fp32": Variant("float32", (WEIGHTS,), graphs)},
        files={},
        versions={"torch": "2.13.0"},
        parity={"fp32/ort-cpu": PARITY},
        parameters={name: ParameterEntry(WEIGHTS, at, shape, "float32") for name, (at, shape) in PARAMETERS.items()},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )
    return dataclasses.replace(whole, **changes)


def write(
    out: Path, graph_nodes: list[Any] | None = None, extra: tuple[TensorProto, ...] = (), **changes: Any
) -> Bundle:
    """Writes the bundle; ``changes`` are fields of the manifest."""
    with BundleWriter(out) as writer:
        (writer.path / WEIGHTS).write_bytes(bytes(SIZE))
        for target in ("canonical", "ort-cpu"):
            save_graph(writer.path / f"{target}.onnx", nodes() if graph_nodes is None else graph_nodes, extra)
        return writer.commit(manifest(**changes))
