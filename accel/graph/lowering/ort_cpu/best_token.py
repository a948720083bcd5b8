"""A decoder's graph finds its likeliest tokens itself, while the logits are in the cores' caches.

NumPy reads them from memory and with one thread: beside a run that cost 30 to 40 microseconds per step.
"""

from __future__ import annotations

import accel_cpu
import onnx_ir as ir

from accel.spec import BEST_LOGITS, BEST_TOKENS


def add_best_token(model: ir.Model) -> int:
    """Adds the outputs ``best_tokens`` int64 [R] and ``best_logits`` float32 [R] of a decoder's ``logits`` [R, V].

    The operator is one of ``accel_cpu``; its body serves where that library is missing. Returns 1 if it applied.
    """
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if logits is None or logits.shape is None or logits.dtype != ir.DataType.FLOAT:
        return 0
    node = ir.node(accel_cpu.ARGMAX, [logits], domain=accel_cpu.DOMAIN, num_outputs=2)
    shape = ir.Shape(logits.shape[:-1])
    for output, name, dtype in zip(
        node.outputs, (BEST_TOKENS, BEST_LOGITS), (ir.DataType.INT64, ir.DataType.FLOAT), strict=True
    ):
        output.name, output.type, output.shape = name, ir.TensorType(dtype), shape
        model.graph.outputs.append(output)
    model.graph.append(node)
    model.opset_imports[accel_cpu.DOMAIN] = 1
    body = _body()
    model.functions[body.identifier()] = body
    return 1


def _body() -> ir.Function:
    """TopK finds NaN too, and the first among equals; ArgMax does not find NaN."""
    x = ir.Value(name="x")
    nodes: list[ir.Node] = []
    for op_type, inputs, attributes, names in (
        ("Constant", [], {"value_ints": [1]}, ["k"]),
        ("TopK", ["x", "k"], {"axis": -1}, ["largest", "places"]),
        ("Constant", [], {"value_ints": [-1]}, ["last"]),
        ("Squeeze", ["places", "last"], {}, ["index"]),
        ("Squeeze", ["largest", "last"], {}, ["value"]),
    ):
        known = {"x": x} | {output.name: output for node in nodes for output in node.outputs}
        node = ir.node(op_type, [known[name] for name in inputs], attributes, num_outputs=len(names))
        for output, name in zip(node.outputs, names, strict=True):
            output.name = name
        nodes.append(node)
    outputs = [nodes[-2].outputs[0], nodes[-1].outputs[0]]
    graph = ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 23}, name=accel_cpu.ARGMAX)
    return ir.Function(accel_cpu.DOMAIN, accel_cpu.ARGMAX, graph=graph, attributes=[])


__all__ = ["add_best_token"]
