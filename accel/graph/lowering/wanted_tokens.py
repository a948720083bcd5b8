"""A decoder's last layer for the tokens alone whose logits are wanted.

What follows the last attention is nine tenths of a layer's work, and computes each token by itself. Of a prompt one
token's logits are wanted, or none.
"""

from __future__ import annotations

import onnx_ir as ir

from accel.graph.edit import rank, replace_value

_POSITIONS = "logits_positions"
_ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Gelu", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"})
_NORMS = {"LayerNormalization", "RMSNormalization"}


def choose_tokens_early(model: ir.Model) -> int:
    """Moves the choice of tokens, a Gather by ``logits_positions``, from the head to right behind the last attention.

    Args:
        model: Canonical, nodes in topological order, values [1, T, W] between embedding and choice and [1, R, W]
            behind it; changed in place. Nodes that may look at other tokens, and what they read, stay as they are.

    Returns:
        How many nodes compute the R chosen tokens now, and computed all T.
    """
    graph = model.graph
    uses = [use for value in graph.inputs if value.name == _POSITIONS for use in value.uses()]
    choice = uses[0].node if len(uses) == 1 else None
    if choice is None or not _chooses(choice):
        return 0
    behind, read = _behind_attention(graph, choice)
    if not behind:
        return 0
    for value in read:
        if value.producer() in behind:
            value.shape = _chosen_shape(value, choice)
        else:
            _choose(graph, value, choice, behind)
    replace_value(choice.outputs[0], choice.inputs[0])  # type: ignore[arg-type]
    graph.remove(choice, safe=True)
    return len(behind)


def _chooses(node: ir.Node) -> bool:
    """Whether it chooses tokens of [1, T, W]."""
    source = node.inputs[0] if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 1 else None
    return source is not None and rank(source) == rank(node.outputs[0]) == 3


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
        if not tokens or readers - behind - {choice} or any(value.is_graph_output() for value in node.outputs):
            continue
        behind.add(node)
        read |= dict.fromkeys(tokens)
    return behind, list(read)


def _tokens_of(node: ir.Node) -> list[ir.Value]:
    """What it reads of each token; empty: it may look at others, or nothing says that it does not."""
    if not _looks_at_one(node):
        return []
    first, *others = [value for value in node.inputs if value is not None]
    if node.op_type in _ELEMENTWISE:
        tokens = [value for value in (first, *others) if not _is_alike_for_all(value)]
    else:
        tokens = [first] if all(value.is_initializer() and rank(value) in (1, 2) for value in others) else []
    return tokens if all(_has_tokens(value, node.outputs[0]) for value in tokens) else []


def _looks_at_one(node: ir.Node) -> bool:
    """Whether it computes each token of [1, T, W] from that one, if what is not per token is alike for all."""
    if node.domain:
        return (node.domain, node.op_type) == ("accel", "Linear")
    if node.op_type in _NORMS:
        return node.attributes.get_int("axis", -1) in (-1, 2)
    if node.op_type == "Split":
        return node.attributes.get_int("axis", 0) in (-1, 2)
    return node.op_type in _ELEMENTWISE


def _is_alike_for_all(value: ir.Value) -> bool:
    """Whether it is a number or a row, which all tokens get."""
    size = rank(value)
    return size is not None and (size < 2 or (value.is_initializer() and value.shape[-2] == 1))  # type: ignore[index]


def _has_tokens(value: ir.Value, like: ir.Value) -> bool:
    """Whether it is [1, T, W] as the other is; dimensions that are not known are not alike."""
    if value.shape is None or like.shape is None or len(value.shape) != 3:
        return False
    known = all(isinstance(size, int) or size.value is not None for size in value.shape[:2])
    return known and list(value.shape[:2]) == list(like.shape[:2])


def _choose(graph: ir.Graph, value: ir.Value, choice: ir.Node, readers: set[ir.Node]) -> None:
    """Lets the readers have the chosen tokens of a value."""
    made = ir.node("Gather", [value, choice.inputs[1]], {"axis": 1})
    made.outputs[0].type, made.outputs[0].shape = value.type, _chosen_shape(value, choice)
    reading = [use for use in value.uses() if use.node in readers]
    # Late, for the cuda engine, which runs nodes in order: a sum is added up by the norm that reads it too.
    first = next(node for node in graph if any(use.node is node for use in reading))
    graph.insert_before(first, made)
    for use in reading:
        use.node.replace_input_with(use.idx, made.outputs[0])


def _chosen_shape(value: ir.Value, choice: ir.Node) -> ir.Shape:
    """[1, T, W] with R in place of T."""
    assert value.shape is not None and choice.outputs[0].shape is not None
    return ir.Shape([value.shape[0], choice.outputs[0].shape[1], value.shape[2]])


__all__ = ["choose_tokens_early"]
