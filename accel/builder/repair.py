"""Puts right, through the network API, what the parser makes of a graph that says something else.

1. The parser multiplies Attention's query and key by sqrt(scale), for a scale of 1 too: at every step a product over
   the whole key cache. Both products go, once their constants are seen to be exactly 1.
2. Attention in float32 has no fused kernel and is marked decomposable.
"""

from __future__ import annotations

from typing import Any

from accel.builder.network_view import NetworkView
from accel.builder.parse import ParsedNetwork
from accel.errors import EngineProofError


def repair(parsed: ParsedNetwork) -> dict[str, int]:
    """Repairs a network in place; returns what it did, by name.

    Raises:
        EngineProofError: A product before the attention is not by 1: the scale would count twice.
    """
    view = NetworkView(parsed)
    bypassed = decomposed = 0
    for layer in view.of_type("ATTENTION_INPUT"):
        for place in (0, 1):
            bypassed += _bypass(view, layer, place)
        if view.dtype(layer.get_input(0)) == "float32" and not layer.attention.decomposable:
            layer.attention.decomposable = True
            decomposed += 1
    return {"products_by_one_bypassed": bypassed, "float32_attention_decomposed": decomposed}


def _bypass(view: NetworkView, layer: Any, place: int) -> bool:
    """Rewires an operand past the parser's product by one; whether there was such a product."""
    product = view.maker(layer.get_input(place), "ELEMENTWISE")
    if product is None or product.metadata or product.op.name != "PROD":  # products of ours carry their node's name
        return False
    factor = view.number(product.get_input(1))
    if factor != 1.0:
        raise EngineProofError(
            f"the parser multiplies the {('query', 'key')[place]} by {factor}",
            where=f"node {layer.attention.name}",
            remedy="The graph's Attention must have scale=1.0, with a Mul of the query before it; export again",
        )
    layer.set_input(place, product.get_input(0))
    return True


__all__ = ["repair"]
