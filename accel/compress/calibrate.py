"""Runs a canonical graph over calibration text, node by node, and shows each product's inputs before it is computed.

All samples pass a node before the next node is computed, so that a layer can be quantised between its inputs and its
outputs: what follows then sees what the quantised layers before it really give. Memory holds the values that some
later node still reads, of all samples: two or three per token and layer width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.compress.layers import Layer
from accel.spec import ArchSpec

Rounding = Callable[[Any], Any]
Visit = Callable[[ir.Node, list[Any]], Rounding | None]


def feeds_of(model: ir.Model, arch: ArchSpec, ids: NDArray[np.int64], logits: bool = False) -> dict[str, NDArray]:
    """A sample's inputs by name, every one that the graph has: one sequence without padding, caches empty.

    Args:
        ids: Token ids, int64 [T].
        logits: Ask a decoder for those of every position; otherwise of the last.
    """
    length = len(ids)
    feeds: dict[str, NDArray] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if value in model.graph.initializers.values():
            continue
        if name.startswith("past."):
            shape = [{"B": 1, "C": length}.get(str(size), size) for size in value.shape or ()]
            feeds[name] = np.zeros([int(size) for size in shape], np.float32)
    whole, places = np.asarray(ids, np.int64), np.arange(length, dtype=np.int64)
    if arch.kind == "decoder":
        feeds |= {"input_ids": whole, "position_ids": places, "past_lengths": np.zeros(1, np.int32)}
        feeds |= {"query_lengths": np.array([length], np.int32)}
        feeds["logits_positions"] = places if logits else places[-1:]
        return feeds
    rows = {"input_ids": whole[None], "attention_mask": np.ones((1, length), np.int64)}
    rows["token_type_ids"] = np.zeros((1, length), np.int64)
    return {value.name or "": rows[value.name or ""] for value in model.graph.inputs if value.name in rows}


class Sweep:
    """One pass of all samples through a graph's nodes.

    Args:
        model: Canonical.
        samples: Graph inputs by name, of each sample.
        stops: Products to show; what none of them needs is not computed.
        advance: Told of each node that is computed; None: nobody is.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Iterable[Mapping[str, NDArray]],
        stops: Iterable[ir.Node],
        advance: Callable[[int], None] | None = None,
    ) -> None:
        from accel.engines.torch_operators import to_torch

        self._graph = model.graph
        self._stops, self._advance = set(stops), advance
        needed = self._needed()
        self._nodes = [node for node in model.graph if node in needed]
        self._tensor = to_torch
        self._weights: dict[ir.Value, Any] = {}
        names = {value: value.name or "" for value in model.graph.inputs}
        self._values: list[dict[ir.Value, Any]] = [
            {value: to_torch(sample[name]) for value, name in names.items() if name in sample} for sample in samples
        ]

    def __len__(self) -> int:
        """The nodes that are computed."""
        return len(self._nodes)

    def _needed(self) -> set[ir.Node]:
        found: set[ir.Node] = set()
        waiting = list(self._stops)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [value.producer() for value in node.inputs if value is not None and value.producer()]
        return found

    def run(self, visit: Visit) -> None:
        """Computes the nodes in order; ``visit(node, inputs)`` is called before each product to show.

        Args:
            visit: Gets the product and its input of each sample, tensors [..., K]. What it does to the weight is seen
                by the product, and what it returns is done to the product's input.
        """
        steps, rounding = self.steps(), None
        try:
            node, inputs = next(steps)
            while True:
                rounding = visit(node, inputs)
                node, inputs = steps.send(rounding)
        except StopIteration:
            return

    def steps(self) -> Generator[tuple[ir.Node, list[Any]], Rounding | None, None]:
        """The same as a generator, which is sent what ``visit`` would return."""
        import torch

        from accel.graph.evaluation.torch_graph import TABLES

        last = {value: node for node in self._nodes for value in node.inputs if value is not None}
        readers = self._readers()
        for node in self._nodes:
            if self._advance is not None:
                self._advance(1)
            rounding = None
            if node in self._stops:
                rounding = yield node, [values[node.inputs[0]] for values in self._values]  # type: ignore[index]
                if node not in readers:
                    continue
            ending = [value for value in node.inputs if value is not None and last[value] is node]
            compute = TABLES[node.domain][node.op_type]
            with torch.inference_mode():
                for values in self._values:
                    inputs = [self._read(values, value) for value in node.inputs]
                    if rounding is not None:
                        inputs[0] = rounding(inputs[0])
                    results = compute(node, *inputs)
                    results = results if isinstance(results, list | tuple) else [results]
                    made = zip(node.outputs, results, strict=True)
                    values.update((value, result) for value, result in made if value in last)
                    for value in ending:
                        values.pop(value, None)
            for value in ending:
                self._weights.pop(value, None)

    def _readers(self) -> set[ir.Node]:
        """Products whose results another node to compute reads."""
        return {value.producer() for node in self._nodes for value in node.inputs if value is not None}  # type: ignore[misc]

    def _read(self, values: Mapping[ir.Value, Any], value: ir.Value | None) -> Any:
        if value is None or value in values:
            return None if value is None else values[value]
        if value not in self._weights:
            assert value.const_value is not None, value.name
            self._weights[value] = self._tensor(value.const_value.numpy())
        return self._weights[value]


def products_of(layers: Sequence[Layer]) -> dict[ir.Node, Layer]:
    """The layers' products in order."""
    return {node: layer for layer in layers for node in layer.linears}


def rows_of(inputs: Iterable[Any]) -> Iterator[Any]:
    """Each sample's inputs as a matrix [tokens, K]."""
    for tensor in inputs:
        yield tensor.reshape(-1, tensor.shape[-1])


def second_moments(inputs: Iterable[Any]) -> Any:
    """X^T X over all samples, float32 [K, K]."""
    total = None
    for rows in rows_of(inputs):
        product = rows.T @ rows
        total = product if total is None else total.add_(product)
    return total


def some_rows(inputs: Sequence[Any], count: int) -> Any:
    """Rows of all samples at even distances, at most ``count`` of them: [R, K]."""
    import torch

    rows = torch.cat(list(rows_of(inputs)))
    step = max(1, -(-len(rows) // count))
    return rows[::step].clone()


__all__ = ["Rounding", "Sweep", "feeds_of", "products_of", "rows_of", "second_moments", "some_rows"]
