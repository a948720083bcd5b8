"""Cleaning: fold small constants, merge equal expressions, drop no-ops and dead nodes.

Weights are never folded, compared or copied: only constants of at most a few thousand
elements take part.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from accel.graph.edit import SMALL_ELEMENTS, ints, make_constant, producer, remove_dead, replace_value

_FOLD_LIMIT_ELEMENTS = 64 * 1024  # outputs: masks and position tables, not weight matrices


def clean(model: ir.Model) -> int:
    """Runs all cleaning steps in place; returns how many nodes went."""
    from onnxscript import optimizer  # here: OpenVINO's lowering, which cleans nothing, does without the package

    before = model.graph.num_nodes()
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=SMALL_ELEMENTS,
        output_size_limit=_FOLD_LIMIT_ELEMENTS,
        should_fold=_touches_no_weight,
    )
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    cancel_transposes(model)
    normalize_reshapes(model)
    merge_reshapes(model)
    common.CommonSubexpressionEliminationPass()(model)
    remove_dead(model)
    return before - model.graph.num_nodes()


def _touches_no_weight(node: ir.Node) -> bool | None:
    """Keeps matrices as they are stored; None leaves the decision to the folder's own limits."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.shape is not None and len(value.shape) >= 2:
            return False
    return None


def normalize_reshapes(model: ir.Model) -> None:
    """Gives every reshape a constant target where its traced shapes allow one.

    A dimension that the input has at the same place is written 0 (copy), one further
    unknown dimension -1: shape arithmetic at run time goes, and chains can merge.
    """
    for node in list(model.graph):
        source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Reshape" or source is None or source.shape is None or output.shape is None:
            continue
        if ints(node.inputs[1]) is not None and 0 not in (ints(node.inputs[1]) or ()):
            continue
        target = _target(source.shape, output.shape)
        if target is None:
            continue
        name = "shape_" + "_".join(str(size).replace("-", "m") for size in target)
        node.replace_input_with(1, make_constant(model.graph, name, np.array(target, np.int64)))
        node.attributes.pop("allowzero", None)


def _target(source: ir.Shape, output: ir.Shape) -> list[int] | None:
    if sum(not isinstance(size, int) for size in output) == 1:
        return [size if isinstance(size, int) else -1 for size in output]
    target = []
    for index, size in enumerate(output):
        if isinstance(size, int):
            target.append(size)
        elif index < len(source) and size.value is not None and source[index] == size:
            target.append(0)
        else:
            target.append(-1)
    # A literal 0 (an empty tensor) would read as "copy".
    return target if target.count(-1) <= 1 and 0 not in [size for size in output if isinstance(size, int)] else None


def merge_reshapes(model: ir.Model) -> None:
    """Reshape(Reshape(x)) -> Reshape(x); a reshape to the shape it already has goes."""
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        inner = producer(node.inputs[0], "Reshape")
        target = ints(node.inputs[1])
        if inner is not None and target is not None and _copies_survive(inner, target):
            node.replace_input_with(0, inner.inputs[0])
        source, output = node.inputs[0], node.outputs[0]
        if source is not None and same_shape(source, output) and not output.is_graph_output():
            replace_value(output, source)


def _copies_survive(inner: ir.Node, target: list[int]) -> bool:
    """Whether each 0 of the outer target copies a dimension that the inner reshape left in place."""
    source, output = inner.inputs[0], inner.outputs[0]
    copied = [index for index, size in enumerate(target) if size == 0]
    if not copied:
        return True
    if source is None or source.shape is None or output.shape is None:
        return False
    return all(index < len(source.shape) and source.shape[index] == output.shape[index] for index in copied)


def cancel_transposes(model: ir.Model) -> None:
    """Transpose(Transpose(x)) -> x where the permutations undo each other."""
    for node in list(model.graph):
        inner = producer(node.inputs[0], "Transpose") if node.op_type == "Transpose" else None
        if inner is None or node.outputs[0].is_graph_output():
            continue
        outer_perm, inner_perm = (part.attributes.get_ints("perm", ()) for part in (node, inner))
        if outer_perm and inner_perm and [inner_perm[axis] for axis in outer_perm] == list(range(len(outer_perm))):
            source = inner.inputs[0]
            assert source is not None
            replace_value(node.outputs[0], source)


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values provably have one shape, with at most one dimension inferred from the others."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    unequal = [
        (x, y) for x, y in zip(a.shape, b.shape, strict=True) if x != y or (not isinstance(x, int) and x.value is None)
    ]
    if any(isinstance(x, int) and isinstance(y, int) for x, y in unequal):
        return False
    return len(unequal) <= 1  # equal element counts leave one dimension no freedom
