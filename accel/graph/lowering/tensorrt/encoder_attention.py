"""``accel::Attention`` -> Attention on [B, H, S, D] with a mask.

Case 1: no position bias: a bool mask [B, 1, S, S] of the real keys. Every query also sees itself: a padding query that
saw nothing would divide by zero, and what came of that would reach the real rows as 0 * NaN.
Case 2: a position bias: a mask in the model's dtype, bias where a key is seen and a large negative number elsewhere.
Refused: softcap.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.checks import attention_nodes
from accel.graph.edit import replace_value
from accel.graph.lowering.tensorrt.decoder_attention import HIDDEN
from accel.graph.lowering.tensorrt.emit import Dims, Emitter
from accel.spec import ArchSpec, AttentionSpec


def lower_attention(model: ir.Model, arch: ArchSpec) -> dict[str, int]:
    """Lowers every bidirectional attention node in place; returns how many.

    Raises:
        FusionError: A layer with a softcap.
    """
    masks = _Masks(model.graph)
    nodes = attention_nodes(model, "accel", "Attention")
    for index, (node, layer) in enumerate(zip(nodes, arch.layers, strict=True)):
        if layer.softcap is not None:
            raise FusionError("TensorRT's attention has no softcap", where=f"layer {index}, tensorrt")
        _lower_layer(model.graph, node, layer, f"layers.{index}", masks)
    return {"Attention": len(nodes)}


class _Masks:
    """What hides keys, shared by the layers."""

    def __init__(self, graph: ir.Graph) -> None:
        self._emit = emit = Emitter(graph, graph[0])
        mask = next(value for value in graph.inputs if value.name == "attention_mask")
        real = emit("Equal", [mask, emit.int(1)], ["B", "S"], ir.DataType.BOOL)
        self._real = emit("Unsqueeze", [real, emit.ints(1, 2)], ["B", 1, 1, "S"], ir.DataType.BOOL)
        int64 = ir.DataType.INT64
        length = emit("Squeeze", [emit("Shape", [mask], [1], int64, start=1, end=2), emit.ints(0)], [], int64)
        positions = emit("Range", [emit.int(0), length, emit.int(1)], ["S"], int64)
        column = emit("Unsqueeze", [positions, emit.ints(1)], ["S", 1], int64)
        self._distance = emit("Abs", [emit("Sub", [column, positions], ["S", "S"], int64)], ["S", "S"], int64)
        self._itself = emit("Equal", [self._distance, emit.int(0)], ["S", "S"], ir.DataType.BOOL)
        self._made: dict[int | None, ir.Value] = {}

    def visible(self, window: int | None) -> ir.Value:
        """bool [B, 1, S, S]: the real keys, within the window, and itself."""
        if window not in self._made:
            self._made[window] = self._make(window)
        return self._made[window]

    def _make(self, window: int | None) -> ir.Value:
        emit, boolean, seen = self._emit, ir.DataType.BOOL, self._real
        if window is not None:
            near = emit("LessOrEqual", [self._distance, emit.int(window)], ["S", "S"], boolean)
            seen = emit("And", [seen, near], ["B", 1, "S", "S"], boolean)
        return emit("Or", [seen, self._itself], ["B", 1, "S", "S"], boolean)


def _lower_layer(graph: ir.Graph, node: ir.Node, layer: AttentionSpec, name: str, masks: _Masks) -> None:
    emit, dim = Emitter(graph, node), layer.head_dim
    query, key, value = (
        _heads(emit, item, heads, dim)
        for item, heads in zip(node.inputs[:3], (layer.heads, layer.kv_heads, layer.kv_heads), strict=True)
    )
    scale = emit.number(f"{name}.scale.value", layer.scale)
    scaled = emit("Mul", [query, scale], query.shape or (), name=f"{name}.scale")
    mask = masks.visible(layer.window)
    if len(node.inputs) > 4:
        bias = node.inputs[4]
        assert bias is not None and bias.shape is not None
        mask = emit("Where", [mask, bias, emit.number("hidden_score", HIDDEN)], ["B", *bias.shape[1:]])
    shape: Dims = ("B", layer.heads, "S", dim)
    attended = emit("Attention", [scaled, key, value, mask], shape, name=f"{name}.attention", scale=1.0)
    rows = emit("Transpose", [attended], ["B", "S", layer.heads, dim], perm=[0, 2, 1, 3])
    width = layer.heads * dim
    replace_value(node.outputs[0], emit("Reshape", [rows, emit.ints(0, 0, width)], ["B", "S", width]))
    graph.remove(node, safe=True)


def _heads(emit: Emitter, value: ir.Value | None, heads: int, dim: int) -> ir.Value:
    """[B, S, heads * D] -> [B, heads, S, D]."""
    rows = emit("Reshape", [value, emit.ints(0, 0, heads, dim)], ["B", "S", heads, dim])
    return emit("Transpose", [rows], ["B", heads, "S", dim], perm=[0, 2, 1, 3])


__all__ = ["lower_attention"]
