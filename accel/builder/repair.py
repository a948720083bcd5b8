"""Repairs of what the parser makes of a graph, each proven before it is made.

1. Attention's ``scale``: the parser multiplies the query and the whole key cache by sqrt(scale), also for 1. The two
   products are bypassed where both constants are exactly 1. Refused: any other constant.
2. float32 attention has no fused kernel: there, and only there, the attention may be decomposed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from accel.builder.network import NetworkView
from accel.errors import EngineProofError

_OPERANDS = {0: "query", 1: "key"}


def repair(view: NetworkView) -> list[str]:
    """Makes the repairs in place and returns each in words.

    Raises:
        EngineProofError: A product that the parser made has a constant other than 1.
    """
    done = []
    for layer in view.of_type("ATTENTION_INPUT"):
        name = attention_name(layer)
        for index, operand in _OPERANDS.items():
            if _bypass_product(view, layer, index, f"{name}, {operand}"):
                done.append(f"{name}: the {operand}'s product by 1 bypassed")
        if view.dtype(layer.get_input(0)) == "float32":
            layer.attention.decomposable = True
            done.append(f"{name}: decomposable, as float32 has no fused kernel")
    return done


def attention_name(layer: Any) -> str:
    """The graph's node that an ATTENTION_INPUT layer comes from; its own metadata are empty."""
    metadata = str(layer.attention.metadata)
    return metadata.removeprefix("[ONNX Layer: ").removesuffix("]") or str(layer.name)


def _bypass_product(view: NetworkView, layer: Any, index: int, where: str) -> bool:
    """Feeds the layer what the parser's product read; False where there is no such product."""
    product = view.producer(layer.get_input(index))
    # Products of the graph itself say which node they come from; the parser's own do not.
    if product is None or product.type.name != "ELEMENTWISE" or product.metadata or product.op.name != "PROD":
        return False
    for own, other in ((0, 1), (1, 0)):
        constant = view.constant(product.get_input(other))
        if constant is None:
            continue
        if constant[1] is None or not np.array_equal(np.ravel(constant[1]), [1.0]):
            value = constant[1] if constant[1] is None else np.ravel(constant[1]).tolist()
            what = f"The parser multiplies the {_OPERANDS[index]} by {value}, which cannot be undone exactly"
            remedy = "Lower Attention with scale = 1.0 and multiply the query by the scale before it"
            raise EngineProofError(what, where=where, remedy=remedy)
        layer.set_input(index, product.get_input(own))
        return True
    return False


__all__ = ["attention_name", "repair"]
