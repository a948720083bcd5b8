"""``accel::Attention`` -> two products around a softmax, the form that OpenVINO's CPU plugin makes one kernel of.

Case 1: no window, no bias: one row of key scores per sequence, [B, 1, 1, S], zero or far below every score, is added.
Case 2: a window: that row and the window's [S, S], added once for all layers with this window.
Case 3: a position bias: it and the mask are added to each other once, and that to the scores of all layers.
Case 4: grouped heads: a dimension for the group, [B, KV, G, S, D], and the keys' and values' stands at 1.
Case 5: a softcap: Tanh between two factors.
Case 6: three projections of one input: one product and a Split, which took MiniLM 1x8 down by a tenth (bf16: a fifth).

ONNX's ``Attention`` would do too, but OpenVINO takes its optional inputs apart with a dozen nodes per layer that look
for NaN and pad the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from accel.graph.checks import attention_nodes
from accel.graph.edit import last_dim, producer, replace_value
from accel.graph.lowering.tensorrt.emit import Dims, Emitter
from accel.spec import ArchSpec, AttentionSpec

HIDDEN = -1e9  # a number that bf16 has too; minus infinity would make NaN of a row without a visible key


def lower_attention(model: ir.Model, arch: ArchSpec) -> dict[str, int]:
    """Lowers every bidirectional attention node in place; returns how many."""
    masks = _Masks(model.graph)
    nodes = attention_nodes(model, "accel", "Attention")
    for index, (node, layer) in enumerate(zip(nodes, arch.layers, strict=True)):
        _lower_layer(model.graph, node, layer, f"layers.{index}", masks)
    return {"MatMul, Softmax, MatMul": len(nodes)}


class _Masks:
    """What is added to the scores, shared by the layers."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._emit = graph, (emit := Emitter(graph, graph[0]))
        self._mask = next(value for value in graph.inputs if value.name == "attention_mask")
        zero, hidden = emit.number("visible", 0.0), emit.number("hidden", HIDDEN)
        real = emit("Equal", [self._mask, emit.int(1)], ["B", "S"], ir.DataType.BOOL)
        row = emit("Where", [real, zero, hidden], ["B", "S"])
        self._keys = emit("Unsqueeze", [row, emit.ints(1, 2)], ["B", 1, 1, "S"])
        self._made: dict[tuple[int | None, int, ir.Value | None], ir.Value] = {}

    def added(self, window: int | None, heads: list[int], bias: ir.Value | None = None) -> ir.Value:
        """float32 [B, 1 or H, 1 or S, S], the heads in as many dimensions as ``heads`` has numbers.

        Args:
            window: Of the layer.
            heads: The number of heads; for grouped ones two numbers.
            bias: [B or 1, H, S, S].
        """
        key = (window, len(heads), bias)
        if key not in self._made:
            self._made[key] = self._make(window, heads, bias)
        return self._made[key]

    def _make(self, window: int | None, heads: list[int], bias: ir.Value | None) -> ir.Value:
        maker = None if bias is None else bias.producer()
        emit = self._emit if maker is None else _after(self._graph, maker)
        rows: int | str = 1 if window is None else "S"
        made = self._keys if window is None else self._within(window)
        if len(heads) > 1:
            made = self._emit("Unsqueeze", [made, self._emit.ints(1)], ["B", 1, 1, rows, "S"])
        return made if bias is None else emit("Add", [_in_groups(emit, bias, heads), made], ["B", *heads, "S", "S"])

    def _within(self, window: int) -> ir.Value:
        emit, int64 = self._emit, ir.DataType.INT64
        length = emit("Squeeze", [emit("Shape", [self._mask], [1], int64, start=1, end=2), emit.ints(0)], [], int64)
        positions = emit("Range", [emit.int(0), length, emit.int(1)], ["S"], int64)
        column = emit("Unsqueeze", [positions, emit.ints(1)], ["S", 1], int64)
        distance = emit("Abs", [emit("Sub", [column, positions], ["S", "S"], int64)], ["S", "S"], int64)
        near = emit("LessOrEqual", [distance, emit.int(window)], ["S", "S"], ir.DataType.BOOL)
        far = emit("Where", [near, emit.number("visible", 0.0), emit.number("hidden", HIDDEN)], ["S", "S"])
        return emit("Add", [self._keys, far], ["B", 1, "S", "S"])


def _lower_layer(graph: ir.Graph, node: ir.Node, layer: AttentionSpec, name: str, masks: _Masks) -> None:
    emit, dim = Emitter(graph, node), layer.head_dim
    group = layer.heads // layer.kv_heads
    heads: list[int] = [layer.heads] if group == 1 else [layer.kv_heads, group]
    shared: list[int] = [layer.heads] if group == 1 else [layer.kv_heads, 1]
    projected = _projections(graph, node)
    query = _heads(emit, projected[0], heads, dim)
    key = _heads(emit, projected[1], shared, dim, turned=True)
    value = _heads(emit, projected[2], shared, dim)
    square: Dims = ["B", *heads, "S", "S"]
    scores = emit("MatMul", [query, key], square)
    scores = emit("Mul", [scores, emit.number(f"{name}.scale", layer.scale)], square)
    if layer.softcap is not None:
        cap = emit.number(f"{name}.softcap", layer.softcap)
        scores = emit("Mul", [emit("Tanh", [emit("Div", [scores, cap], square)], square), cap], square)
    scores = emit("Add", [scores, masks.added(layer.window, heads, *node.inputs[4:5])], square)
    weights = emit("Softmax", [scores], square, axis=-1)
    attended = emit("MatMul", [weights, value], ["B", *heads, "S", dim], name=f"{name}.attention")
    order = [0, 2, 1, 3] if group == 1 else [0, 3, 1, 2, 4]
    rows = emit("Transpose", [attended], ["B", "S", *heads, dim], perm=order)
    width = layer.heads * dim
    replace_value(node.outputs[0], emit("Reshape", [rows, emit.ints(0, 0, width)], ["B", "S", width]))
    graph.remove(node, safe=True)


def _projections(graph: ir.Graph, node: ir.Node) -> Sequence[ir.Value | None]:
    """Query, key and value [B, S, W]: of one product where they are products of the same input.

    Their weights are joined in the graph, which OpenVINO does once when it compiles it: nothing is stored twice.
    """
    given = node.inputs[:3]
    linears = [linear for linear in (producer(value, "Linear") for value in given) if linear is not None]
    sources = {(linear.inputs[0], linear.attributes.get_int("transposed", 0), len(linear.inputs)) for linear in linears}
    if len(linears) < 3 or len(sources) > 1 or linears[0].attributes.get_int("transposed", 0) != 1:
        return given
    emit, widths = Emitter(graph, node), [last_dim(value) for value in given if value is not None]
    total = sum(width or 0 for width in widths)
    parts = [[linear.inputs[place] for linear in linears] for place in range(1, len(linears[0].inputs))]
    joined = [emit("Concat", part, [total, *(part[0].shape or ())[1:]], axis=0) for part in parts]  # type: ignore[union-attr]
    product = ir.node("Linear", [linears[0].inputs[0], *joined], {"transposed": 1}, domain="accel")
    product.outputs[0].type, product.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", "S", total])
    graph.insert_before(node, product)
    sizes = emit.ints(*(width or 0 for width in widths))
    split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=3)
    for output, width in zip(split.outputs, widths, strict=True):
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", "S", width])
    graph.insert_before(node, split)
    return split.outputs


def _after(graph: ir.Graph, node: ir.Node) -> Emitter:
    """Inserts behind a node, so that all layers find the result before them."""
    following = graph[[*graph].index(node) + 1]
    return Emitter(graph, following)


def _in_groups(emit: Emitter, bias: ir.Value, heads: list[int]) -> ir.Value:
    """[B or 1, H, S, S], split into groups where heads are."""
    assert bias.shape is not None
    if len(heads) == 1:
        return bias
    shape: Dims = [bias.shape[0], *heads, *bias.shape[2:]]
    sizes = emit("Shape", [bias], [2], ir.DataType.INT64, start=2)
    rows = emit("Shape", [bias], [1], ir.DataType.INT64, end=1)
    target = emit("Concat", [rows, emit.ints(*heads), sizes], [5], ir.DataType.INT64, axis=0)
    return emit("Reshape", [bias, target], shape)


def _heads(emit: Emitter, value: ir.Value | None, heads: list[int], dim: int, turned: bool = False) -> ir.Value:
    """[B, S, W] -> [B, *heads, S, D]; ``turned``: [B, *heads, D, S]."""
    rows = emit("Reshape", [value, emit.ints(0, 0, *heads, dim)], ["B", "S", *heads, dim])
    before = list(range(2, 2 + len(heads)))
    last, shape = ([len(heads) + 2, 1], [dim, "S"]) if turned else ([1, len(heads) + 2], ["S", dim])
    return emit("Transpose", [rows], ["B", *heads, *shape], perm=[0, *before, *last])


__all__ = ["HIDDEN", "lower_attention"]
