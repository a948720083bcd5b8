"""``accel::Attention`` -> ``MultiHeadAttention`` with a key padding mask.

The kernel takes the mask as a number of keys per row, for which it has fused kernels, or as a mask [B, S], which may
have holes and runs unfused. The graph lets the session choose: ``key_mask`` is flat, ``key_mask_shape`` gives it one
dimension or two. Biases of query, key and value go into the kernel where all three have one.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.checks import attention_nodes
from accel.graph.edit import replace_value
from accel.graph.lowering.ort_cpu.encoder_attention import without_bias, without_expand
from accel.graph.lowering.packed import merge_rows
from accel.graph.lowering.tensorrt.emit import Emitter
from accel.spec import ArchSpec

MICROSOFT = "com.microsoft"
HIDDEN = -30000.0  # a masked score: the softmax gives 0, and fp16 holds it


def lower_attention(model: ir.Model, arch: ArchSpec) -> dict[str, int]:
    """Lowers every bidirectional attention node in place; returns how many.

    Raises:
        FusionError: Grouped heads or a softcap, which this kernel lacks.
    """
    graph = model.graph
    masks = _Masks(graph)
    nodes = attention_nodes(model, "accel", "Attention")
    for index, (node, layer) in enumerate(zip(nodes, arch.layers, strict=True)):
        if layer.softcap is not None or layer.heads != layer.kv_heads:
            what = "MultiHeadAttention has neither softcap nor grouped heads"
            raise FusionError(what, where=f"layer {index}, ort-cuda")
        _lower_layer(graph, node, index, masks)
    masks.drop_unread()
    return {"MultiHeadAttention": len(nodes)}


class _Masks:
    """What hides keys, shared by the layers."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._given = next(value for value in graph.inputs if value.name == "attention_mask")
        place = graph.inputs.index(self._given) + 1
        flat, shape = (
            self._input("key_mask", ir.DataType.INT32, "M"),
            self._input("key_mask_shape", ir.DataType.INT64, "D"),
        )
        graph.inputs[place:place] = [flat, shape]
        self._emit = Emitter(graph, graph[0])
        node = ir.node("Reshape", [flat, shape])
        node.outputs[0].type = ir.TensorType(ir.DataType.INT32)
        graph.insert_before(graph[0], node)
        self.keys = node.outputs[0]
        self._windows: dict[int, ir.Value] = {}

    @staticmethod
    def _input(name: str, dtype: ir.DataType, size: str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([size]))

    def drop_unread(self) -> None:
        """The caller's mask stays an input only where the model itself reads it."""
        if not self._given.uses():
            self._graph.inputs.remove(self._given)

    def window(self, size: int) -> ir.Value:
        """float32 [1, 1, S, S]: hides keys with |query - key| > size."""
        if size not in self._windows:
            self._windows[size] = self._make_window(size)
        return self._windows[size]

    def _make_window(self, size: int) -> ir.Value:
        emit, int64 = self._emit, ir.DataType.INT64
        ids = next(value for value in self._graph.inputs if value.name == "input_ids")
        length = emit("Squeeze", [emit("Shape", [ids], [1], int64, start=1, end=2), emit.ints(0)], [], int64)
        positions = emit("Range", [emit.int(0), length, emit.int(1)], ["S"], int64)
        column = emit("Unsqueeze", [positions, emit.ints(1)], ["S", 1], int64)
        distance = emit("Abs", [emit("Sub", [column, positions], ["S", "S"], int64)], ["S", "S"], int64)
        far = emit("Greater", [distance, emit.int(size)], ["S", "S"], ir.DataType.BOOL)
        bias = emit("Where", [far, emit.number("hidden_score", HIDDEN), emit.number("seen_score", 0.0)], ["S", "S"])
        return emit("Unsqueeze", [bias, emit.ints(0, 1)], [1, 1, "S", "S"])


def _lower_layer(graph: ir.Graph, node: ir.Node, index: int, masks: _Masks) -> None:
    window = node.attributes["window"].as_int() if "window" in node.attributes else None
    score_bias = without_expand(node.inputs[4]) if len(node.inputs) > 4 else None
    if window is not None:
        if score_bias is not None:
            raise FusionError("a window together with a score bias", where=f"layer {index}, ort-cuda")
        score_bias = masks.window(window)
    qkv, bias = _operands(graph, node, index)
    made = ir.node(
        "MultiHeadAttention",
        [*qkv, bias, masks.keys, score_bias],
        {
            "num_heads": node.attributes["num_heads"].as_int(),
            "scale": node.attributes["scale"].as_float(),
            "mask_filter_value": HIDDEN,
        },
        domain=MICROSOFT,
        name=f"layers.{index}.attention",
    )
    made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, made)
    replace_value(node.outputs[0], made.outputs[0])
    graph.remove(node, safe=True)


def _operands(graph: ir.Graph, node: ir.Node, index: int) -> tuple[list[ir.Value | None], ir.Value | None]:
    """Query, key and value, and the bias [3 * W] that the kernel adds to them; None: they have theirs already."""
    found = [without_bias(node, place) for place in range(3)]
    biases = [bias for _, bias in found if bias is not None and bias.is_initializer()]
    if len(biases) < 3:
        return list(node.inputs[:3]), None
    return [value for value, _ in found], merge_rows(graph, biases, f"layers.{index}.qkv.bias")


__all__ = ["lower_attention"]
