"""``accel::Attention`` -> the fastest of three kernels, chosen per call; or the operator of ``accel_cpu``.

Variants that store integers take ``accel.cpu::Attention`` where nodes have neither window nor bias: it rounds to
bfloat16 where the CPU multiplies that, and takes masks as they come. Queries, keys and values then are one product,
which rounds its input once, and the operator reads them side by side. All other nodes take ONNX Runtime's kernels.

Short rows without padding take ONNX's ``Attention``, which keeps all scores and is 15 to 40 % faster up to
``SHORT`` tokens. Longer ones take the flash path of ``MultiHeadAttention``, which wants neither mask nor bias; what
is padded or looks through a window takes ``MultiHeadAttention`` with its mask. Each layer is an ``If``: the tests
run once per call, the branch costs about 3 microseconds.

The kernels get projections without the biases that attention can do without. A bias of the keys moves all scores of
a query alike, which the softmax does not see. A bias of the values passes through, since the weights of a query
add up to one, and goes into the bias of the projection that follows.
"""

from __future__ import annotations

import accel_cpu
import numpy as np
import onnx_ir as ir

from accel.errors import FusionError
from accel.graph.checks import attention_nodes
from accel.graph.edit import make_constant, producer, rank, replace_value, sole_consumer
from accel.graph.lowering.fused_linear import join_linears
from accel.graph.quantized import concatenated
from accel.spec import ArchSpec, AttentionSpec

MICROSOFT = "com.microsoft"
SHORT = 384  # tokens: at 256 ONNX's Attention took 610 us where the flash path took 700; at 512 both took 2.4 ms


def lower_attention(model: ir.Model, arch: ArchSpec, integers: bool = False) -> int:
    """Lowers every bidirectional attention node in place; returns how many take the operator of ``accel_cpu``.

    Args:
        integers: The variant stores integers: what it computes is not exact anyway, and its error is measured.

    Raises:
        FusionError: grouped heads or a softcap, which this kernel lacks.
    """
    graph = model.graph
    shared = _Shared(graph)
    own = 0
    for index, node in enumerate(attention_nodes(model, "accel", "Attention")):
        layer = arch.layers[index]
        if layer.softcap is not None or layer.heads != layer.kv_heads:
            raise FusionError("MultiHeadAttention has neither softcap nor grouped heads", where=f"layer {index}")
        if integers and len(node.inputs) <= 4 and _is_plain(layer):
            _lower_to_own(graph, node, index, shared)
            own += 1
        else:
            _lower_layer(graph, node, index, shared)
    if own:
        model.opset_imports[accel_cpu.DOMAIN] = 1
    return own


def _is_plain(layer: AttentionSpec) -> bool:
    return layer.window is None and layer.head_dim <= accel_cpu.LARGEST_HEAD


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
        longest = make_constant(graph, "short", np.array(SHORT, np.int64))
        self._is_short = self._op("LessOrEqual", [self._length, longest], {}, ir.DataType.BOOL, ())
        self._short: dict[ir.Value, ir.Value] = {}
        self._windows: dict[int, tuple[ir.Value, ir.Value]] = {}

    def short(self, condition: ir.Value) -> ir.Value:
        """The condition, and at most ``SHORT`` tokens."""
        if condition not in self._short:
            self._short[condition] = self._op("And", [condition, self._is_short], {}, ir.DataType.BOOL, ())
        return self._short[condition]

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


def _lower_to_own(graph: ir.Graph, node: ir.Node, index: int, shared: _Shared) -> None:
    query, bias = without_bias(node, 0)
    key, _ = without_bias(node, 1)
    value, value_bias = without_bias(node, 2)
    packed = _side_by_side(graph, node, [query, key, value], bias, f"layers.{index}.queries.bias")
    inputs = [*node.inputs[:1], key, value] if packed is None else [packed, None, None]
    attributes = {"num_heads": node.attributes["num_heads"].as_int(), "scale": node.attributes["scale"].as_float()}
    made = ir.node(
        accel_cpu.ATTENTION, [*inputs, shared.mask], attributes, domain=accel_cpu.DOMAIN,
        name=f"layers.{index}.attention",
    )  # fmt: skip
    _take_place(graph, node, made)
    if value_bias is not None:
        _pass_on(graph, made, value_bias, index)


def _side_by_side(
    graph: ir.Graph, before: ir.Node, parts: list[ir.Value | None], bias: ir.Value | None, name: str
) -> ir.Value | None:
    """One product that gives all parts, the first one with its bias; None: their weights are not integers, alike."""
    linears = [producer(part, "Linear") for part in parts]
    weights = [linear.inputs[1] for linear in linears if linear is not None]
    known = [weight.const_value for weight in weights if weight is not None]
    added = None if bias is None or bias.const_value is None else bias.const_value.numpy()
    if len(known) != len(parts) or concatenated(known, "") is None or (bias is not None and added is None):
        return None
    joined = join_linears(graph, before, [part for part in parts if part is not None])
    if joined is not None and added is not None:
        outputs = sum(tensor.shape.numpy()[0] for tensor in known if tensor is not None)
        whole = np.pad(added, (0, outputs - len(added)))
        product = joined.producer()
        assert product is not None
        product.resize_inputs(len(product.inputs) + 1)
        product.replace_input_with(len(product.inputs) - 1, make_constant(graph, name, whole))
    return joined


def _take_place(graph: ir.Graph, node: ir.Node, made: ir.Node) -> None:
    output = node.outputs[0]
    made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
    graph.insert_before(node, made)
    replace_value(output, made.outputs[0])
    graph.remove(node, safe=True)


def _lower_layer(graph: ir.Graph, node: ir.Node, index: int, shared: _Shared) -> None:
    heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
    query = node.inputs[0]
    key, _ = without_bias(node, 1)
    value, value_bias = without_bias(node, 2)
    window = node.attributes["window"].as_int() if "window" in node.attributes else None
    bias = without_expand(node.inputs[4]) if len(node.inputs) > 4 else None
    condition, masked_bias = shared.no_padding, bias
    if window is not None:
        if bias is not None:
            raise FusionError("a window together with a score bias", where=f"layer {index}")
        condition, masked_bias = shared.window(window)

    def kernel(name: str, op_type: str, domain: str, inputs: list, attributes: dict) -> ir.Graph:
        return _branch(ir.node(op_type, inputs, attributes, domain=domain), f"layers.{index}.attention.{name}", node)

    own, counts = {"num_heads": heads, "scale": scale}, {"q_num_heads": heads, "kv_num_heads": heads, "scale": scale}
    qkv = [query, key, value]
    flash = kernel("flash", "MultiHeadAttention", MICROSOFT, [*qkv, None, None, bias], own)
    masked = kernel("masked", "MultiHeadAttention", MICROSOFT, [*qkv, None, shared.mask, masked_bias], own)
    short = kernel("short", "Attention", "", [*qkv, bias] if bias is not None else qkv, counts)
    rest = ir.node("If", [condition], {"then_branch": flash, "else_branch": masked})
    choice = ir.node(
        "If",
        [shared.short(condition)],
        {"then_branch": short, "else_branch": _branch(rest, f"layers.{index}.attention.rest", node)},
        name=f"layers.{index}.attention",
    )
    _take_place(graph, node, choice)
    if value_bias is not None:
        _pass_on(graph, choice, value_bias, index)


def _branch(node: ir.Node, name: str, like: ir.Node) -> ir.Graph:
    """A graph of one node that gives what ``like`` gives."""
    node.name = name
    (output,) = node.outputs
    output.name, output.type, output.shape = f"{name}.output", like.outputs[0].type, like.outputs[0].shape
    return ir.Graph([], [output], nodes=[node], name=name.replace(".", "_"))


def without_bias(node: ir.Node, index: int) -> tuple[ir.Value | None, ir.Value | None]:
    """(input ``index`` without its projection's bias, that bias)."""
    value = node.inputs[index]
    linear = producer(value, "Linear")
    if linear is None or len(linear.inputs) != 3 or rank(linear.inputs[2]) != 1:  # type: ignore[arg-type]
        return value, None
    bare = ir.node("Linear", linear.inputs[:2], linear.attributes, domain="accel")
    bare.outputs[0].type, bare.outputs[0].shape = linear.outputs[0].type, linear.outputs[0].shape
    assert node.graph is not None
    node.graph.insert_before(node, bare)
    return bare.outputs[0], linear.inputs[2]


def _pass_on(graph: ir.Graph, attention: ir.Node, bias: ir.Value, index: int) -> None:
    """Adds the values' bias after the attention: within the next projection's bias b' = b + W bias, or by itself."""
    output = attention.outputs[0]
    linear = sole_consumer(output, "Linear")
    folded = None if linear is None else _fold(graph, linear, bias, f"layers.{index}.carried.bias")
    if linear is not None and folded is not None:
        linear.replace_input_with(2, folded)
        return
    add = ir.node("Add", [output, bias])
    graph.insert_after(attention, add)
    ir.convenience.replace_all_uses_with(output, add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, output)
    add.outputs[0].type, add.outputs[0].shape = output.type, output.shape


def _fold(graph: ir.Graph, linear: ir.Node, bias: ir.Value, name: str) -> ir.Value | None:
    """What the linear's bias becomes when the bias is added to its input; None: it has no constant bias."""
    if len(linear.inputs) != 3 or linear.attributes.get_int("transposed", 0) != 1:
        return None
    tensors = [value.const_value if value is not None else None for value in (*linear.inputs[1:], bias)]
    if any(tensor is None for tensor in tensors):
        return None
    weight, own, added = (tensor.numpy().astype(np.float64) for tensor in tensors if tensor is not None)
    return make_constant(graph, name, (own + weight @ added).astype(np.float32))


def without_expand(bias: ir.Value | None) -> ir.Value | None:
    """The kernel broadcasts a bias over the batch itself."""
    expand = producer(bias, "Expand")
    if expand is None:
        return bias
    source = expand.inputs[0]
    fits = source is not None and source.shape is not None and len(source.shape) == 4 and source.shape[0] == 1
    return source if fits else bias
