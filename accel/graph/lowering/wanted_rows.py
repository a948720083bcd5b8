"""A decoder's last layer for the tokens alone whose logits are wanted.

Behind the last attention no token looks at another one, and of a prompt one token's logits are wanted: there, nine
tenths of a layer are for that one.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import rank, replace_value

POSITIONS = "logits_positions"
_NORMS = {"LayerNormalization", "RMSNormalization"}
_ELEMENTWISE = {
    "Add", "Cast", "Clip", "Div", "Erf", "Exp", "Gelu", "Identity", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal",
    "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh",
}  # fmt: skip


def choose_tokens_early(model: ir.Model) -> int:
    """Moves the choice of tokens from the head to right behind the last attention.

    Args:
        model: Canonical, [1, T, W] between embedding and logits; changed in place.

    Returns:
        How many nodes compute the chosen tokens alone since.
    """
    graph = model.graph
    uses = [use for value in graph.inputs if value.name == POSITIONS for use in value.uses()]
    choice = uses[0].node if len(uses) == 1 else None
    if choice is None or choice.op_type != "Gather" or choice.inputs[0] is None:
        return 0
    place = choice.attributes.get_int("axis", 0)
    if rank(choice.inputs[0]) != 3 or rank(choice.outputs[0]) != 3 or place != 1:
        return 0
    behind, read = _behind_attention(graph, choice)
    for value in read:
        if value.producer() in behind:
            value.shape = _chosen_shape(value, choice)
        elif behind:
            _choose(graph, value, choice, behind)
    if behind:
        replace_value(choice.outputs[0], choice.inputs[0])
        graph.remove(choice, safe=True)
    return len(behind)


def _behind_attention(graph: ir.Graph, choice: ir.Node) -> tuple[set[ir.Node], list[ir.Value]]:
    """Nodes that compute each token by itself and whose results nothing but the choice needs; what they and it read."""
    assert choice.inputs[0] is not None
    behind: set[ir.Node] = set()
    read = dict.fromkeys([choice.inputs[0]])  # a set in an order that repeats
    for node in reversed(graph):
        if not any(value in read for value in node.outputs):
            continue
        readers = {use.node for value in node.outputs for use in value.uses()}
        tokens = _tokens_of(node)
        if tokens is None or readers - behind - {choice} or any(value.is_graph_output() for value in node.outputs):
            continue
        behind.add(node)
        read |= dict.fromkeys(tokens)
    return behind, list(read)


def _tokens_of(node: ir.Node) -> list[ir.Value] | None:
    """What it reads of each token; None: it may look at others, or nothing says that it does not."""
    if not _looks_at_one(node):
        return None
    tokens = [value for value in node.inputs if value is not None]
    if node.op_type in _ELEMENTWISE:
        tokens = [value for value in tokens if not (value.is_initializer() or rank(value) in (0, 1))]
    else:
        tokens = tokens[:1]
    alike = all(_has_tokens(value, node.outputs[0]) for value in (*tokens, *node.outputs))
    return tokens if alike else None


def _looks_at_one(node: ir.Node) -> bool:
    """Whether it computes each token of [1, T, W] from that one."""
    if node.domain:
        return (node.domain, node.op_type) == ("accel", "Linear")
    if node.op_type in _NORMS:
        return node.attributes.get_int("axis", -1) in (-1, 2)
    if node.op_type == "Split":
        return node.attributes.get_int("axis", 0) in (-1, 2)
    return node.op_type in _ELEMENTWISE


def _has_tokens(value: ir.Value, like: ir.Value) -> bool:
    """Whether it is [1, T, W] as the other is."""
    if value.shape is None or like.shape is None or len(value.shape) != 3 or value.is_initializer():
        return False
    return list(value.shape[:2]) == list(like.shape[:2])


def _choose(graph: ir.Graph, value: ir.Value, choice: ir.Node, readers: set[ir.Node]) -> None:
    """Lets the readers have the chosen tokens of a value."""
    made = ir.node("Gather", [value, choice.inputs[1]], {"axis": 1})
    made.outputs[0].type, made.outputs[0].shape = value.type, _chosen_shape(value, choice)
    reading = [use for use in value.uses() if use.node in readers]
    # Late: on our own engine the norm that reads the value too adds it up on the way.
    first = next(node for node in graph if any(use.node is node for use in reading))
    graph.insert_before(first, made)
    for use in reading:
        use.node.replace_input_with(use.idx, made.outputs[0])


def _chosen_shape(value: ir.Value, choice: ir.Node) -> ir.Shape:
    assert value.shape is not None and choice.outputs[0].shape is not None
    return ir.Shape([value.shape[0], choice.outputs[0].shape[1], value.shape[2]])


__all__ = ["POSITIONS", "choose_tokens_early"]
