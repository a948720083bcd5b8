"""Proves that a parsed network computes what its graph says, row by row, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.builder.attention_proof import attention_rows, cache_rows
from accel.builder.lowering_proof import lowering_rows
from accel.builder.mask_proof import mask_rows
from accel.builder.network import NetworkView
from accel.builder.node_proof import operation_rows
from accel.builder.proof_table import ProofRow, ProofTable, row
from accel.builder.quantized_proof import quantized_rows
from accel.builder.source import GraphSource
from accel.errors import EngineProofError
from accel.spec import ArchSpec, TensorSpec

# Operators whose operands must be float32 in every variant: in fp16 their sums overflow.
ISLANDS = ("LayerNormalization", "RMSNormalization", "Softmax")
PRODUCTS = ("Gemm", "MatMul")  # operators that compute in the variant's own type
_FLOATS = ("float32", "float16", "bfloat16")
_REMEDIES = {
    "attention": "Lower the layer's attention to one Attention node with that name",
    "dtype": "Put Cast nodes around the node: strong types compute in the type of their operands",
    "weights": "Lower the weight to a DequantizeLinear that nothing but the product stands behind",
    "inputs": "Lower the input to QuantizeLinear and DequantizeLinear right before the product",
    "consumed": "Remove the input from the graph, or lower the node that reads it so that the parser keeps it",
}


@dataclass(frozen=True)
class Proof:
    """What the proof reads.

    Attributes:
        view: The network after its repairs.
        source: The graph it was parsed from.
        arch: The model's architecture: what each layer must be.
        dtype: The type of attention and caches, e.g. ``float16``; None: what the graph's scale constants have.
        canonical: The graph that it was lowered from, the witness of what ``arch`` does not hold; None: unknown.
    """

    view: NetworkView
    source: GraphSource
    arch: ArchSpec
    dtype: str | None = None
    canonical: Path | None = None


def prove(proof: Proof, repairs: list[str]) -> ProofTable:
    """Compares network and graph.

    Returns:
        All rows, also the failed ones: see ``check``.

    Raises:
        EngineProofError: The network's shapes do not fit together, or a value is not in it.
        EngineBuildError: The canonical graph cannot be read.
    """
    rows: list[ProofRow] = []
    for index, layer in enumerate(proof.arch.layers):
        rows += attention_rows(proof.view, proof.source, index, layer, proof.dtype)
        if proof.arch.kind == "decoder":
            rows += cache_rows(proof.view, proof.source, index)
    rows += mask_rows(proof.source, proof.arch)
    rows += _count_rows(proof)
    rows += _tensor_rows(proof)
    rows += _node_rows(proof)
    rows += operation_rows(proof.view, proof.source)
    rows += quantized_rows(proof.view, proof.source)
    rows += _island_rows(proof)
    rows += _product_rows(proof)
    if proof.canonical is not None:
        rows += lowering_rows(proof.source, proof.canonical, proof.arch)
    return ProofTable(tuple(rows), tuple(repairs))


def check(table: ProofTable) -> None:
    """Raises the first failed row as an error.

    Raises:
        EngineProofError: Names the node or layer, what was expected and found, and how many rows failed.
    """
    failures = table.failures
    if not failures:
        return
    first = failures[0]
    what = f"The network is not the graph: {first.check} should be {first.expected}, and is {first.found}"
    more = f" ({len(failures)} rows of the proof failed)" if len(failures) > 1 else ""
    remedy = _REMEDIES.get(first.check.split()[-1], "Lower the node so that the parser keeps what it says")
    layer = "the whole network" if first.layer is None else f"layer {first.layer}"
    where = f"node {first.node}, {layer}" if first.node else layer
    raise EngineProofError(what + more, where=where, remedy=remedy)


def _count_rows(proof: Proof) -> Iterator[ProofRow]:
    fused = sum(layer.softcap is None for layer in proof.arch.layers)
    yield row(None, "", "fused attention layers", fused, len(proof.view.of_type("ATTENTION_INPUT")))
    updates = 2 * len(proof.arch.layers) if proof.arch.kind == "decoder" else 0
    yield row(None, "", "cache updates", updates, len(proof.view.of_type("KV_CACHE_UPDATE")))


def _tensor_rows(proof: Proof) -> Iterator[ProofRow]:
    """Inputs and outputs: all there, none more, with the type and shape the graph says, and every input read."""
    view, consumed = proof.view, proof.view.consumed()
    for kind, specs, tensors in (
        ("inputs", proof.source.inputs, view.inputs),
        ("outputs", proof.source.outputs, view.outputs),
    ):
        named = {spec.name for spec in specs}
        yield row(None, "", f"{kind} missing", "none", ", ".join(sorted(named - set(tensors))) or "none")
        yield row(None, "", f"{kind} added", "none", ", ".join(sorted(set(tensors) - named)) or "none")
        for spec in specs:
            if (tensor := tensors.get(spec.name)) is not None:
                yield row(None, spec.name, "tensor", _said(spec), f"{view.dtype(tensor)} {_dims(view.shape(tensor))}")
    for spec in proof.source.inputs:
        yield row(None, spec.name, "input consumed", "yes", "yes" if spec.name in consumed else "no")
    for spec in proof.source.outputs:
        if spec.name == "logits":
            yield row(None, spec.name, "logits dtype", "float32", spec.dtype)


def _said(spec: TensorSpec) -> str:
    return f"{spec.dtype} {_dims(-1 if isinstance(dim, str) else dim for dim in spec.shape)}"


def _dims(shape: Any) -> str:
    return "[" + ", ".join("?" if dim < 0 else str(dim) for dim in shape) + "]"


def _node_rows(proof: Proof) -> Iterator[ProofRow]:
    """Every node that computes something is in some layer's metadata, or made a tensor of its own."""
    folded = proof.source.folded()
    lost, total = [], 0
    for node in proof.source.needed():
        if node.op_type == "Constant" or all(name in folded for name in node.output):
            continue
        total += 1
        if not proof.view.of_node(node.name) and not all(proof.view.makes(name) for name in node.output if name):
            lost.append(node.name)
    yield row(None, lost[0] if lost else "", "nodes found", f"{total} of {total}", f"{total - len(lost)} of {total}")
    nested = [node.name for node in proof.source.proto.graph.node if any(a.HasField("g") for a in node.attribute)]
    yield row(None, nested[0] if nested else "", "subgraphs", 0, len(nested))


def _island_rows(proof: Proof) -> Iterator[ProofRow]:
    """Norms and softmaxes of our own: every floating operand of their layers is float32."""
    for node in proof.source.proto.graph.node:
        if node.op_type in ISLANDS:
            layers = proof.view.of_node(node.name)
            operands = [tensor for layer in layers for tensor in proof.view.operands(layer)]
            found = sorted({name for tensor in operands if (name := proof.view.dtype(tensor)) in _FLOATS})
            yield row(proof.source.layer_index(node.name), node.name, "dtype", "float32", "+".join(found))


def _product_rows(proof: Proof) -> Iterator[ProofRow]:
    """Matrix products take operands of the asked type: one left in float32 would store and read twice as much."""
    if proof.dtype is None:
        return
    wrong = []
    for node in proof.source.proto.graph.node:
        for layer in proof.view.of_node(node.name) if node.op_type in PRODUCTS else ():
            found = {proof.view.dtype(tensor) for tensor in proof.view.operands(layer)}
            if layer.type.name == "MATRIX_MULTIPLY" and found != {proof.dtype}:
                index = proof.source.layer_index(node.name)
                wrong.append(row(index, node.name, "product dtype", proof.dtype, "+".join(sorted(found))))
    yield from wrong or [row(None, "", "product dtype", proof.dtype, proof.dtype)]


__all__ = ["ISLANDS", "Proof", "check", "prove"]
