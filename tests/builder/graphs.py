"""Small graphs as the lowering for TensorRT makes them: decoders with caches and windows, and encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from accel.spec import ArchSpec, AttentionSpec

HIDDEN, VOCAB, HEAD_DIM, HEADS, KV_HEADS, POSITIONS = 64, 96, 32, 4, 2, 512
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass
class GraphWriter:
    """Collects nodes and initializers; node names are output names unless given."""

    dtype: str
    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def node(self, op: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=name or output, **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: str | None = None) -> str:
        array = np.asarray(value)
        if dtype is not None:
            array = array.astype(helper.tensor_dtype_to_np_dtype(DTYPES[dtype]))
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.standard_normal(shape, np.float32) * 0.05, self.dtype)

    def cast(self, source: str, output: str, dtype: str) -> str:
        return self.node("Cast", [source], output, to=DTYPES[dtype])

    def rms_norm(self, source: str, name: str, size: int = HIDDEN) -> str:
        wide = self.cast(source, f"{name}.wide", "float32")
        weight = self.constant(f"{name}.weight", np.ones(size), "float32")
        return self.cast(self.node("RMSNormalization", [wide, weight], f"{name}.norm"), name, self.dtype)

    def heads(self, source: str, name: str, count: int, hidden: int = HIDDEN) -> str:
        flat = self.node("MatMul", [source, self.weight(f"{name}.weight", hidden, count * HEAD_DIM)], f"{name}.flat")
        shape = self.constant(f"{name}.shape", np.array([0, 0, count, HEAD_DIM], np.int64))
        split = self.node("Reshape", [flat, shape], f"{name}.split")
        return self.node("Transpose", [split], name, perm=[0, 2, 1, 3])


def value(name: str, dtype: int, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def decoder(
    dtype: str = "float16",
    windows: tuple[int | None, ...] = (None,),
    scale: float = HEAD_DIM**-0.5,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    causal: bool = False,
    softcap: float | None = None,
) -> Any:
    """A decoder with one layer for each entry of ``windows``.

    Args:
        dtype: Of weights, caches and attention.
        windows: Sliding window of each layer; None: unlimited.
        scale: Of every layer's scores.
        hidden: Hidden size; ``vocab``: rows of the embedding and of the head.
        causal: Spoils the graph: ``is_causal`` in place of the mask.
        softcap: Of every layer's scores; with it attention is written out.
    """
    g = GraphWriter(dtype)
    g.constant("slots", np.arange(POSITIONS).reshape(1, 1, 1, POSITIONS))
    g.constant("axes.1", np.array([1], np.int64))
    g.constant("axes.1.3", np.array([1, 3], np.int64))
    g.constant("cos", np.cos(np.outer(np.arange(POSITIONS), np.arange(HEAD_DIM // 2))), dtype)
    g.constant("sin", np.sin(np.outer(np.arange(POSITIONS), np.arange(HEAD_DIM // 2))), dtype)
    masks = {window: _mask(g, window) for window in dict.fromkeys(windows)}
    stream = g.node("Gather", [g.weight("embedding", vocab, hidden), "input_ids"], "embedded", axis=0)
    for layer, window in enumerate(windows):
        stream = _decoder_layer(g, layer, stream, masks[window], scale, hidden, causal, softcap)
    flat = g.node("Reshape", [g.rms_norm(stream, "final", hidden), g.constant("flat", np.array([-1, hidden]))], "rows")
    picked = g.node("Gather", [flat, "logits_positions"], "picked", axis=0)
    g.cast(g.node("MatMul", [picked, g.weight("head", hidden, vocab)], "narrow"), "logits", "float32")
    return _decoder_model(g, len(windows), vocab)


def _mask(g: GraphWriter, window: int | None) -> str:
    if "positions" not in {node.output[0] for node in g.nodes}:
        g.node("Unsqueeze", ["position_ids", "axes.1.3"], "positions")
        # As many slots as the cache has, whatever number the builder writes for "C".
        g.node("Shape", ["past.0.key"], "capacity", start=2, end=3)
        g.constant("zero", np.array([0], np.int64))
        g.constant("axis.3", np.array([3], np.int64))
        g.node("Slice", ["slots", "zero", "capacity", "axis.3"], "slots.used")
        g.node("LessOrEqual", ["slots.used", "positions"], "seen")
    if window is None:
        return "seen"
    edge = g.node("Sub", ["positions", g.constant(f"window.{window}", np.array(window, np.int64))], f"edge.{window}")
    return g.node("And", ["seen", g.node("Greater", ["slots.used", edge], f"near.{window}")], f"mask.{window}")


def _decoder_layer(
    g: GraphWriter, i: int, stream: str, mask: str, scale: float, hidden: int, causal: bool, softcap: float | None
) -> str:
    at = f"layers.{i}"
    normed = g.rms_norm(stream, f"{at}.input_norm", hidden)
    q, k, v = (g.heads(normed, f"{at}.{n}", c, hidden) for n, c in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
    q, k = (g.node("RotaryEmbedding", [x, "cos", "sin", "position_ids"], f"{x}.rotated") for x in (q, k))
    options: dict[str, Any] = {"axis": -2, "mode": "linear"}
    for source, kind in ((k, "key"), (v, "value")):
        inputs = [f"past.{i}.{kind}", source, "write_index"]
        g.node("TensorScatter", inputs, f"present.{i}.{kind}", f"{at}.{kind}_update", **options)
    scaled = g.node("Mul", [q, g.constant(f"{at}.scale.value", scale, g.dtype)], f"{at}.scaled", f"{at}.scale")
    inputs = [scaled, f"present.{i}.key", f"present.{i}.value"]
    if softcap is not None:
        attended = _capped(g, at, inputs, mask, softcap)
    elif causal:
        attended = g.node("Attention", inputs, f"{at}.attended", f"{at}.attention", scale=1.0, is_causal=1)
    else:
        attended = g.node("Attention", [*inputs, mask], f"{at}.attended", f"{at}.attention", scale=1.0)
    return _after_attention(g, at, stream, attended, hidden)


def _capped(g: GraphWriter, at: str, inputs: list[str], mask: str, softcap: float) -> str:
    """Attention written out, on [B, KV, H / KV, S, D]."""
    query, key, value = inputs
    shapes = {
        "grouped": [0, KV_HEADS, HEADS // KV_HEADS, -1, HEAD_DIM],
        "joined": [0, HEADS, -1, HEAD_DIM],
        "axis": [2],
    }
    for name, shape in shapes.items():
        g.constant(f"{at}.{name}.shape", np.array(shape, np.int64))
    grouped = g.node("Reshape", [query, f"{at}.grouped.shape"], f"{at}.grouped")
    keys, values = (g.node("Unsqueeze", [x, f"{at}.axis.shape"], f"{x}.grouped") for x in (key, value))
    keys = g.node("Transpose", [keys], f"{at}.keys", perm=[0, 1, 2, 4, 3])
    cap = g.constant(f"{at}.softcap.value", softcap, "float32")
    scores = g.cast(g.node("MatMul", [grouped, keys], f"{at}.narrow_scores"), f"{at}.scores", "float32")
    bounded = g.node("Tanh", [g.node("Div", [scores, cap], f"{at}.divided")], f"{at}.tanh")
    capped = g.node("Mul", [bounded, cap], f"{at}.capped")
    shown = g.node("Unsqueeze", [mask, f"{at}.axis.shape"], f"{at}.mask")
    hidden = g.constant(f"{at}.hidden", -30000.0, "float32")
    masked = g.node("Where", [shown, capped, hidden], f"{at}.masked")
    weights = g.cast(g.node("Softmax", [masked], f"{at}.softmax", axis=-1), f"{at}.weights", g.dtype)
    mixed = g.node("MatMul", [weights, values], f"{at}.heads", f"{at}.attention")
    return g.node("Reshape", [mixed, f"{at}.joined.shape"], f"{at}.attended")


def _after_attention(g: GraphWriter, at: str, stream: str, attended: str, hidden: int) -> str:
    rows = g.node("Transpose", [attended], f"{at}.rows", perm=[0, 2, 1, 3])
    shape = g.constant(f"{at}.rows.shape", np.array([0, 0, HEADS * HEAD_DIM], np.int64))
    joined = g.node("Reshape", [rows, shape], f"{at}.joined")
    out = g.node("MatMul", [joined, g.weight(f"{at}.o.weight", HEADS * HEAD_DIM, hidden)], f"{at}.o")
    stream = g.node("Add", [stream, out], f"{at}.residual")
    normed = g.rms_norm(stream, f"{at}.post_norm", hidden)
    gate = g.node("MatMul", [normed, g.weight(f"{at}.gate.weight", hidden, 2 * hidden)], f"{at}.gate")
    up = g.node("MatMul", [normed, g.weight(f"{at}.up.weight", hidden, 2 * hidden)], f"{at}.up")
    mixed = g.node("Mul", [g.node("Swish", [gate], f"{at}.swish"), up], f"{at}.mixed")
    down = g.node("MatMul", [mixed, g.weight(f"{at}.down.weight", 2 * hidden, hidden)], f"{at}.down")
    return g.node("Add", [stream, down], f"{at}.out")


def _decoder_model(g: GraphWriter, layers: int, vocab: int) -> Any:
    integer, float_type = TensorProto.INT64, DTYPES[g.dtype]
    inputs = [value(name, integer, "B", "S") for name in ("input_ids", "position_ids")]
    inputs += [value("write_index", integer, "B"), value("logits_positions", integer, "R")]
    outputs = [value("logits", TensorProto.FLOAT, "R", vocab)]
    for i in range(layers):
        for kind in ("key", "value"):
            inputs.append(value(f"past.{i}.{kind}", float_type, "B", KV_HEADS, "C", HEAD_DIM))
            outputs.append(value(f"present.{i}.{kind}", float_type, "B", KV_HEADS, "C", HEAD_DIM))
    return model(g.nodes, inputs, outputs, g.weights)


def encoder(dtype: str = "float16", layers: int = 1, float_mask: bool = False) -> Any:
    """An encoder with LayerNormalization, Gelu and a padding mask (or, ``float_mask``, a bias in the dtype)."""
    g = GraphWriter(dtype)
    g.constant("axes.1.2", np.array([1, 2], np.int64))
    wide = g.node("Unsqueeze", ["attention_mask", "axes.1.2"], "mask.wide")
    mask = g.node("Cast", [wide], "mask", to=TensorProto.BOOL)
    if float_mask:
        zero, low = g.constant("bias.zero", 0.0, dtype), g.constant("bias.low", -1e4, dtype)
        mask = g.node("Where", [mask, zero, low], "mask.bias")
    stream = g.node("Gather", [g.weight("embedding", VOCAB, HIDDEN), "input_ids"], "embedded", axis=0)
    for i in range(layers):
        at = f"layers.{i}"
        q, k, v = (g.heads(stream, f"{at}.{name}", HEADS) for name in "qkv")
        scale = g.constant(f"{at}.scale.value", HEAD_DIM**-0.5, dtype)
        scaled = g.node("Mul", [q, scale], f"{at}.scaled", f"{at}.scale")
        attended = g.node("Attention", [scaled, k, v, mask], f"{at}.attended", f"{at}.attention", scale=1.0)
        stream = _encoder_rest(g, at, stream, attended)
    g.cast(stream, "last_hidden_state", "float32")
    inputs = [value(name, TensorProto.INT64, "B", "S") for name in ("input_ids", "attention_mask")]
    outputs = [value("last_hidden_state", TensorProto.FLOAT, "B", "S", HIDDEN)]
    return model(g.nodes, inputs, outputs, g.weights)


def _encoder_rest(g: GraphWriter, at: str, stream: str, attended: str) -> str:
    rows = g.node("Transpose", [attended], f"{at}.rows", perm=[0, 2, 1, 3])
    shape = g.constant(f"{at}.rows.shape", np.array([0, 0, HEADS * HEAD_DIM], np.int64))
    joined = g.node("Reshape", [rows, shape], f"{at}.joined")
    out = g.node("MatMul", [joined, g.weight(f"{at}.o.weight", HEADS * HEAD_DIM, HIDDEN)], f"{at}.o")
    wide = g.cast(g.node("Add", [stream, out], f"{at}.residual"), f"{at}.wide", "float32")
    weight, bias = (
        g.constant(f"{at}.norm.{n}", np.full(HIDDEN, v), "float32") for n, v in (("weight", 1), ("bias", 0))
    )
    stream = g.cast(g.node("LayerNormalization", [wide, weight, bias], f"{at}.norm"), f"{at}.normed", g.dtype)
    up = g.node("MatMul", [stream, g.weight(f"{at}.up.weight", HIDDEN, 2 * HIDDEN)], f"{at}.up")
    down = g.weight(f"{at}.down.weight", 2 * HIDDEN, HIDDEN)
    return g.node(
        "Add", [stream, g.node("MatMul", [g.node("Gelu", [up], f"{at}.gelu"), down], f"{at}.down")], f"{at}.out"
    )


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any], **domains: int) -> Any:
    graph = helper.make_graph(nodes, "model", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 24), *(helper.make_opsetid(name, v) for name, v in domains.items())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def arch(windows: tuple[int | None, ...] = (None,), kind: Any = "decoder", **changes: Any) -> ArchSpec:
    """The architecture of these graphs."""
    decoding = kind == "decoder"
    specs = tuple(
        AttentionSpec(HEADS, KV_HEADS if decoding else HEADS, HEAD_DIM, HEAD_DIM**-0.5, window, causal=decoding)
        for window in windows
    )
    values: dict[str, Any] = {
        "family": "tiny",
        "architecture": "Tiny",
        "kind": kind,
        "task": "text-generation" if decoding else "feature-extraction",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "max_positions": POSITIONS,
        "parameters": 1,
        "tied_embeddings": False,
        "layers": specs,
    }
    return ArchSpec(**{**values, **changes})


def save(proto: Any, folder: Path, external: bool = True) -> Path:
    """Writes the graph; with ``external``, all but the small initializers lie in ``weights.bin`` beside it."""
    path = folder / "model.onnx"
    if external:
        onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=256)
    else:
        onnx.save(proto, path)
    return path


def change(proto: Any, name: str, edit: Callable[[Any], None]) -> Any:
    """Edits the node of that name in place."""
    (node,) = (node for node in proto.graph.node if node.name == name)
    edit(node)
    return proto
