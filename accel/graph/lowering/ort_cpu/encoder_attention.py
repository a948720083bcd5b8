"""``accel::Attention`` -> ``MultiHeadAttention``, with a branch for batches without padding.

The kernel takes its flash path only when it is given no mask and no bias, 10 to 25 % of the
whole attention. So each layer is an ``If`` on "no padding (and nothing outside the window)":
the test runs once per call, the branch costs about 3 microseconds.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.checks import attention_nodes
from accel.graph.edit import make_constant, producer, rank, replace_value
from accel.graph.lowering.ort_cpu.packed import merge_rows
from accel.spec import ArchSpec

MICROSOFT = "com.microsoft"


def lower_attention(model: ir.Model, arch: ArchSpec) -> None:
    """Lowers every bidirectional attention node in place.

    Raises:
        FusionError: grouped heads or a softcap, which this kernel lacks.
    """
    graph = model.graph
    shared = _Shared(graph)
    for index, node in enumerate(attention_nodes(model, "accel", "Attention")):
        layer = arch.layers[index]
        if layer.softcap is not None or layer.heads != layer.kv_heads:
            raise FusionError("MultiHeadAttention has neither softcap nor grouped heads", where=f"layer {index}")
        _lower_layer(graph, node, index, shared)


class _Shared:
    """Values that all layers read: the mask as int32, the conditions, one bias per window."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        attention_mask = next(value for value in graph.inputs if value.name == "attention_mask")
        first = graph[0]
        self._before = first
        self.mask = self._op("Cast", [attention_mask], {"to": ir.DataType.INT32}, ir.DataType.INT32, ("B", "S"))
        smallest = self._op("ReduceMin", [self.mask], {"keepdims": 0}, ir.DataType.INT32, ())
        self.no_padding = self._op("Cast", [smallest], {"to": ir.DataType.BOOL}, ir.DataType.BOOL, ())
        shape = self._op("Shape", [attention_mask], {"start": 1, "end": 2}, ir.DataType.INT64, (1,))
        axis = make_constant(graph, "axis_0", np.array([0], np.int64))
        self._length = self._op("Squeeze", [shape, axis], {}, ir.DataType.INT64, ())
        self._windows: dict[int, tuple[ir.Value, ir.Value]] = {}

    def _op(self, op_type: str, inputs: list[ir.Value], attributes: dict, dtype: ir.DataType, shape: tuple) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(shape)
        self.graph.insert_before(self._before, node)
        return node.outputs[0]

    def window(self, size: int) -> tuple[ir.Value, ir.Value]:
        """(condition that nothing is masked, bias [1, 1, S, S] that hides keys with |q - k| > size)."""
        if size not in self._windows:
            self._windows[size] = self._make_window(size)
        return self._windows[size]

    def _make_window(self, size: int) -> tuple[ir.Value, ir.Value]:
        def number(value: float, dtype: type) -> ir.Value:
            name = f"{dtype.__name__}_{value}".replace("-", "m").replace(".", "_").replace("+", "")
            return make_constant(self.graph, name, np.array(value, dtype))

        zero, one = number(0, np.int64), number(1, np.int64)
        positions = self._op("Range", [zero, self._length, one], {}, ir.DataType.INT64, ("S",))
        column = self._op(
            "Unsqueeze",
            [positions, make_constant(self.graph, "axis_1", np.array([1], np.int64))],
            {},
            ir.DataType.INT64,
            ("S", 1),
        )
        distance = self._op(
            "Abs",
            [self._op("Sub", [column, positions], {}, ir.DataType.INT64, ("S", "S"))],
            {},
            ir.DataType.INT64,
            ("S", "S"),
        )
        hidden = self._op("Greater", [distance, number(size, np.int64)], {}, ir.DataType.BOOL, ("S", "S"))
        # Finite, so that a padded row with nothing in its window still gives numbers.
        bias = self._op(
            "Where", [hidden, number(-1e9, np.float32), number(0.0, np.float32)], {}, ir.DataType.FLOAT, ("S", "S")
        )
        axes = make_constant(self.graph, "axes_0_1", np.array([0, 1], np.int64))
        bias = self._op("Unsqueeze", [bias, axes], {}, ir.DataType.FLOAT, (1, 1, "S", "S"))
        fits = self._op("LessOrEqual", [self._length, number(size + 1, np.int64)], {}, ir.DataType.BOOL, ())
        return self._op("And", [self.no_padding, fits], {}, ir.DataType.BOOL, ()), bias


def _lower_layer(graph: ir.Graph, node: ir.Node, index: int, shared: _Shared) -> None:
    heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
    attributes = {"num_heads": heads, "scale": scale}
    *qkv, projection_bias = _unbiased(graph, node, index)
    window = node.attributes["window"].as_int() if "window" in node.attributes else None
    bias = _without_expand(node.inputs[4]) if len(node.inputs) > 4 else None
    condition = shared.no_padding
    if window is not None:
        if bias is not None:
            raise FusionError("a window together with a score bias", where=f"layer {index}")
        condition, window_bias = shared.window(window)
        branches = [[None, None], [shared.mask, window_bias]]
    else:
        branches = [[None, bias], [shared.mask, bias]]
    output = node.outputs[0]
    graphs = []
    for name, (mask, score_bias) in zip(("dense", "masked"), branches, strict=True):
        made = ir.node(
            "MultiHeadAttention",
            [*qkv, projection_bias, mask, score_bias],
            attributes,
            domain=MICROSOFT,
            name=f"layers.{index}.attention.{name}",
        )
        made.outputs[0].name = f"layers.{index}.attention.{name}.output"
        made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
        graphs.append(ir.Graph([], made.outputs, nodes=[made], name=f"layers_{index}_{name}"))
    branch = ir.node(
        "If", [condition], {"then_branch": graphs[0], "else_branch": graphs[1]}, name=f"layers.{index}.attention"
    )
    branch.outputs[0].type, branch.outputs[0].shape = output.type, output.shape
    graph.insert_before(node, branch)
    replace_value(output, branch.outputs[0])
    graph.remove(node, safe=True)


def _unbiased(graph: ir.Graph, node: ir.Node, index: int) -> list[ir.Value | None]:
    """[query, key, value, bias]: the projections' biases move into the kernel, which adds them while it transposes."""
    values = list(node.inputs[:3])
    linears = [producer(value, "Linear") for value in values]
    if any(linear is None or len(linear.inputs) != 3 or rank(linear.inputs[2]) != 1 for linear in linears):  # type: ignore[arg-type]
        return [*values, None]
    bias = merge_rows(graph, [linear.inputs[2] for linear in linears], f"layers.{index}.qkv.bias")  # type: ignore[union-attr, misc]
    made: list[ir.Value | None] = []
    for linear in linears:
        assert linear is not None
        bare = ir.node("Linear", linear.inputs[:2], linear.attributes, domain="accel")
        bare.outputs[0].type, bare.outputs[0].shape = linear.outputs[0].type, linear.outputs[0].shape
        graph.insert_before(node, bare)
        made.append(bare.outputs[0])
    return [*made, bias]


def _without_expand(bias: ir.Value | None) -> ir.Value | None:
    """The kernel broadcasts a bias over the batch itself."""
    expand = producer(bias, "Expand")
    if expand is None:
        return bias
    source = expand.inputs[0]
    fits = source is not None and source.shape is not None and len(source.shape) == 4 and source.shape[0] == 1
    return source if fits else bias
