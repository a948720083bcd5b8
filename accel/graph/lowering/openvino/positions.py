"""Integer functions of positions that are computed in floats -> tables.

Case: a Cast from floats to integers whose floats are made, element by element, from one integer value and constants,
such as the logarithmic buckets of relative positions (mpnet, T5). OpenVINO would compute the floats in bfloat16, where
257 is 256, and take the wrong bucket. The integers must come from the sequence's length alone: then they are distances
of positions, and smaller than ``max_positions``.
Refused: whatever else reaches such a Cast; ``unsafe`` finds it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from accel.graph.edit import constant, make_constant, replace_value
from accel.graph.lowering.tensorrt.emit import Emitter

ELEMENTWISE = {
    *("Abs", "Add", "Cast", "Ceil", "Div", "Exp", "Floor", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Sqrt", "Sub"),
}
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def tabulate_positions(model: ir.Model, max_positions: int) -> int:
    """Rewrites in place; returns how many functions became tables."""
    graph, count = model.graph, 0
    for node in _roundings(graph):
        chain = _chain(node)
        if chain is None or not _of_length_alone(chain[1]):
            continue
        table = _evaluate(chain, node, max_positions)
        emit, place = Emitter(graph, node), chain[1]
        dims = place.shape or ()
        values = make_constant(graph, f"positions_{count}", table)
        index = emit("Add", [place, emit.int(max_positions)], dims, ir.DataType.INT64)
        found = emit("Gather", [values, index], dims, node.outputs[0].dtype or ir.DataType.INT64, axis=0)
        replace_value(node.outputs[0], found)
        graph.remove(node, safe=True)
        count += 1
    return count


def unsafe(model: ir.Model) -> list[str]:
    """Names of the nodes that make integers of floats: in bfloat16 they may be others."""
    return [node.name or node.op_type for node in _roundings(model.graph)]


def _roundings(graph: ir.Graph) -> list[ir.Node]:
    casts = [node for node in graph if node.op_type == "Cast" and node.outputs[0].dtype in _INTEGERS]
    return [node for node in casts if (dtype := node.inputs[0].dtype) is not None and dtype.is_floating_point()]  # type: ignore[union-attr]


def _chain(end: ir.Node) -> tuple[list[ir.Node], ir.Value] | None:
    """(the nodes from the integers to ``end``, in order, the integers); None: they are made of something else."""
    found: dict[ir.Node, None] = {}
    sources: set[ir.Value] = set()

    def visit(value: ir.Value | None) -> bool:
        if value is None or constant(value) is not None:
            return value is not None
        node = value.producer()
        if node is None or value.dtype is None:
            return False
        if value.dtype is ir.DataType.INT64:
            sources.add(value)
            return True
        if node.op_type not in ELEMENTWISE or not value.dtype.is_floating_point() or not all(map(visit, node.inputs)):
            return False
        found[node] = None
        return True

    if not visit(end.inputs[0]) or len(sources) != 1:
        return None
    return [*found, end], sources.pop()


def _of_length_alone(value: ir.Value) -> bool:
    """Whether graph inputs reach a value through their shape only."""
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer()
        if current in seen or current.is_initializer() or (node is not None and node.op_type == "Shape"):
            continue
        seen.add(current)
        if node is None:
            return False
        waiting += [item for item in node.inputs if item is not None]
    return True


def _evaluate(chain: tuple[list[ir.Node], ir.Value], end: ir.Node, limit: int) -> np.ndarray:
    """The function's values for -limit to limit, as ONNX Runtime computes them."""
    nodes, source = chain
    places = ir.Value(name="places", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([2 * limit + 1]))
    made: dict[ir.Value, ir.Value] = {source: places}
    copies, constants = [], []
    for number, node in enumerate(nodes):
        inputs = []
        for place, value in enumerate(node.inputs):
            assert value is not None
            if value not in made:
                data = constant(value)
                assert data is not None, "the chain holds nothing else"
                made[value] = ir.Value(name=f"constant_{number}_{place}", const_value=ir.tensor(data))
                constants.append(made[value])
            inputs.append(made[value])
        copy = ir.Node("", node.op_type, inputs, list(node.attributes.values()), num_outputs=1)
        copy.outputs[0].name, copy.outputs[0].type = f"value_{number}", node.outputs[0].type
        made[node.outputs[0]] = copy.outputs[0]
        copies.append(copy)
    result = made[end.outputs[0]]
    result.shape = ir.Shape([2 * limit + 1])
    graph = ir.Graph([places], [result], nodes=copies, initializers=constants, opset_imports={"": 20}, name="positions")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    table: np.ndarray = session.run(None, {"places": np.arange(-limit, limit + 1)})[0]
    return table


__all__ = ["tabulate_positions", "unsafe"]
