"""A llama whose weights lie on no grid: norm weights folded into the products, the residual stream rotated.

SmolLM2's only copy here is a Q4_1 file, so that a 4-bit grid of 32 finds its own points again and proves nothing.
RMSNorm without a weight commutes with a rotation R of the residual stream (S. Ashkboos et al., "SliceGPT",
arXiv:2401.15024, section 3.2): embedding rows times R, R^T before what writes, R behind what reads. Logits stay.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rotation(size: int, seed: int = 0) -> NDArray[np.float64]:
    """A random orthogonal matrix, uniformly distributed: QR of normal numbers, signs of R's diagonal moved to Q."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return q * np.sign(np.diag(r))


def harden(model: ir.Model, seed: int = 0) -> ir.Model:
    """A canonical llama with other weights and the same logits; a tied head gets weights of its own."""
    result = model.clone()
    weights = result.graph.initializers
    _untie(result)
    size = np.shape(_array(weights[TABLE]))[1]
    turn = rotation(size, seed)
    norms = {node: node.inputs[1] for node in result.graph if node.op_type == "RMSNormalization"}
    before = {name: _norm_of(value) for name, value in weights.items() if name.endswith(".weight")}
    for name, value in list(weights.items()):
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if name == TABLE:
            _replace(value, _array(value) @ turn)
        elif kind in READERS or name == HEAD:
            norm = before[name]
            assert norm is not None, f"{name} reads no norm"
            _replace(value, (_array(value) * _array(norm)) @ turn)
        elif kind in WRITERS:
            _replace(value, turn.T @ _array(value))
    for weight in norms.values():
        assert weight is not None
        _replace(weight, np.ones(size))
    return result


def _untie(model: ir.Model) -> None:
    table = model.graph.initializers[TABLE]
    products = [use.node for use in table.uses() if use.node.op_type == "Linear"]
    if products:
        head = ir.Value(name=HEAD, type=table.type, shape=table.shape, const_value=table.const_value)
        model.graph.register_initializer(head)
        for node in products:
            node.replace_input_with(1, head)


def _norm_of(weight: ir.Value) -> ir.Value | None:
    """The weight of the norm whose output a product reads."""
    for use in weight.uses():
        node = use.node.inputs[0].producer() if use.node.op_type == "Linear" else None
        if node is not None and node.op_type == "Gather":  # the head's choice of positions
            node = node.inputs[0].producer()
        if node is not None and node.op_type == "RMSNormalization":
            return node.inputs[1]
    return None


def _array(value: ir.Value) -> NDArray[np.float64]:
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _replace(value: ir.Value, array: NDArray) -> None:
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


__all__ = ["harden"]
