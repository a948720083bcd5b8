"""What must be true of a graph: nothing about attention may be lost between the trace and a target."""

from __future__ import annotations

import onnx_ir as ir

from accel.errors import FusionError
from accel.spec import ArchSpec

CANONICAL = {"encoder": ("accel", "Attention"), "decoder": ("accel", "CachedAttention")}


def attention_nodes(model: ir.Model, domain: str, op_type: str) -> list[ir.Node]:
    """The attention nodes of one kind, in graph order, subgraphs left out."""
    return [node for node in model.graph if node.domain == domain and node.op_type == op_type]


def check_attention(model: ir.Model, arch: ArchSpec) -> tuple[str, ...]:
    """Returns the canonical attention nodes' names, one per layer in layer order.

    Raises:
        FusionError: a layer has no node, or its node's attributes are not the traced layer's.
    """
    domain, op_type = CANONICAL[arch.kind]
    nodes = attention_nodes(model, domain, op_type)
    if len(nodes) != len(arch.layers):
        raise FusionError(
            f"{len(nodes)} {domain}::{op_type} nodes for {len(arch.layers)} layers",
            where=f"layer {len(nodes)}",
            remedy="The trace lost an attention layer; please report the model's configuration",
        )
    for index, (node, layer) in enumerate(zip(nodes, arch.layers, strict=True)):
        node.name = f"layers.{index}.attention"
        found = {name: attribute.value for name, attribute in node.attributes.items()}
        expected: dict[str, int | float] = {
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "scale": layer.scale,
        }
        if layer.window is not None:
            expected["window"] = layer.window
        if layer.softcap is not None:
            expected["softcap"] = layer.softcap
        if found.keys() != expected.keys() or any(abs(found[k] - v) > 1e-6 * abs(v) for k, v in expected.items()):
            raise FusionError(f"attention carries {found}, traced {expected}", where=f"layer {index}")
    return tuple(node.name or "" for node in nodes)
