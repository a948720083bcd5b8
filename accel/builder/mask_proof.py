"""Rows of the proof about what each query sees: the graph's masks are evaluated and compared with the architecture.

The mask of each layer is computed by ONNX's reference evaluator for positions at every edge and for padded rows. So it
does not matter how the lowering writes it: only what it lets through. ``node_proof`` holds the network to the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.builder.proof_table import ProofRow, row
from accel.builder.source import GraphSource
from accel.spec import ArchSpec, AttentionSpec

_HIDDEN = -9e3  # what stands in place of a hidden score, or less
_LONGEST = 1024  # tokens of the rows that encoders' masks are evaluated for


def mask_rows(source: GraphSource, arch: ArchSpec) -> Iterator[ProofRow]:
    """What each layer's queries see: causality, window and padding, as ``arch`` says."""
    masks = _Masks(source, arch)
    for index, layer in enumerate(arch.layers):
        name = f"layers.{index}.attention"
        value = _mask_of(source, source.nodes.get(name))
        if value is None:  # the attention rows say so of fused layers
            if layer.softcap is not None:
                yield row(index, name, "mask", "Where before Softmax", "none")
            continue
        expected = _words(layer, arch)
        found = masks.difference(value, layer) or expected
        yield row(index, name, "visible keys", expected, found)


def _words(layer: AttentionSpec, arch: ArchSpec) -> str:
    parts = ["slot <= position"] if layer.causal else []
    if layer.window is not None:
        parts.append(f"position - slot < {layer.window}" if layer.causal else f"|query - key| <= {layer.window}")
    return ", ".join([*parts, *(["real tokens"] if arch.kind == "encoder" else [])])


def _mask_of(source: GraphSource, node: Any) -> str | None:
    """The value that masks the scores of an attention node, or of the product that ends a written-out one."""
    if node is None or node.op_type == "Attention":
        return str(node.input[3]) if node is not None and len(node.input) > 3 and node.input[3] else None
    softmax = source.maker(node.input[0])
    where = source.maker(softmax.input[0]) if softmax is not None and softmax.op_type == "Softmax" else None
    return str(where.output[0]) if where is not None and where.op_type == "Where" else None


class _Masks:
    """Evaluates each mask once."""

    def __init__(self, source: GraphSource, arch: ArchSpec) -> None:
        self._source, self._arch = source, arch
        self._windows = sorted({layer.window for layer in arch.layers if layer.window is not None})
        self._feeds = self._decoder_feeds() if arch.kind == "decoder" else self._encoder_feeds()
        self._found: dict[str, NDArray[Any] | str] = {}

    def difference(self, value: str, layer: AttentionSpec) -> str | None:
        """How a mask differs from what the layer asks for; None: not at all."""
        if value not in self._found:
            self._found[value] = self._evaluate(value)
        found = self._found[value]
        if isinstance(found, str):
            return found
        if found.ndim == 5:  # of a written-out layer: groups of heads have an axis of their own
            found = found[:, 0]
        expected, counted = self._expected(layer)
        try:
            wrong = (np.broadcast_to(found, expected.shape) != expected) & counted
        except ValueError:
            return f"a mask of shape {list(found.shape)} for {list(expected.shape)}"
        if not wrong.any():
            return None
        batch, _, query, key = (int(place[0]) for place in np.nonzero(wrong))
        at = int(self._queries()[batch, query])
        return f"position {at} {'does not see' if expected[batch, 0, query, key] else 'sees'} {key}"

    def _expected(self, layer: AttentionSpec) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """bool [B, 1, S, keys]: what is seen, and where it matters: padding queries are nobody's."""
        queries = self._queries()[:, None, :, None]
        keys = np.arange(self._source.capacity or queries.shape[2])
        real = self._feeds.get("attention_mask", np.ones((1, 1), np.int64)) == 1
        seen = np.broadcast_to(real[:, None, None, :], np.broadcast_shapes(queries.shape, keys.shape)).copy()
        if layer.causal:
            seen &= keys <= queries
        if layer.window is not None:
            distance = queries - keys
            seen &= distance < layer.window if layer.causal else np.abs(distance) <= layer.window
        return seen, np.broadcast_to(real[:, None, :, None], seen.shape)

    def _queries(self) -> NDArray[np.int64]:
        """Positions [B, S] of the queries."""
        if "position_ids" in self._feeds:
            return self._feeds["position_ids"]
        batch, length = self._feeds["attention_mask"].shape
        return np.tile(np.arange(length), (batch, 1))

    def _decoder_feeds(self) -> dict[str, NDArray[Any]]:
        """Two rows: the positions at the edges of the cache and of the windows, upwards and downwards."""
        slots = self._source.capacity or 1
        edges = {0, 1, slots // 2, slots - 2, slots - 1, *(w + step for w in self._windows for step in (-1, 0, 1))}
        positions = np.array(sorted(edge for edge in edges if 0 <= edge < slots), np.int64)
        return self._fill({"position_ids": np.stack([positions, positions[::-1]])}, len(positions))

    def _encoder_feeds(self) -> dict[str, NDArray[Any]]:
        """Three rows longer than every window: without padding, padded behind, padded before and in between."""
        length = min(_LONGEST, self._arch.max_positions, max([16, *(2 * window + 4 for window in self._windows)]))
        real = np.ones((3, length), np.int64)
        real[1, length * 2 // 3 :] = 0
        real[2, : length // 4] = real[2, length // 2] = 0
        return self._fill({"attention_mask": real}, length)

    def _fill(self, feeds: dict[str, NDArray[Any]], length: int) -> dict[str, NDArray[Any]]:
        """Zeros for all other inputs; caches take no memory."""
        rows = len(next(iter(feeds.values())))
        for spec in self._source.inputs:
            shape = [{"B": rows, "S": length}.get(dim, 1) if isinstance(dim, str) else dim for dim in spec.shape]
            if spec.name not in feeds:
                dtype = np.int64 if spec.dtype == "int64" else np.float32
                feeds[spec.name] = np.broadcast_to(np.zeros((), dtype), shape)
        return feeds

    def _evaluate(self, value: str) -> NDArray[Any] | str:
        """The mask as bool, or why it is none."""
        where = self._source.maker(value)
        if where is not None and where.op_type == "Where":
            hidden = self._source.constant(where.input[2])
            if hidden is None or float(np.max(hidden.astype(np.float32))) > _HIDDEN:
                return "hidden scores that are not hidden"
            value = where.input[0]
        try:
            found = self._run(value)
        except Exception as error:  # whatever the evaluator raises, the mask is not proven
            return f"a mask that cannot be evaluated: {error}"
        return found if found.dtype == np.bool_ else f"a mask of {found.dtype}"

    def _run(self, value: str) -> NDArray[Any]:
        from onnx import TensorProto, helper, numpy_helper
        from onnx.reference import ReferenceEvaluator

        source = self._source
        nodes = source.needed(value)
        read = {name for node in nodes for name in node.input if name}
        inputs = [item for item in source.proto.graph.input if item.name in read]
        constants = [(name, source.constant(name)) for name in sorted(read) if source.is_initializer(name)]
        tensors = [numpy_helper.from_array(array, name) for name, array in constants if array is not None]
        output = helper.make_tensor_value_info(value, TensorProto.UNDEFINED, None)
        graph = helper.make_graph(nodes, "mask", inputs, [output], tensors)
        model = helper.make_model(graph, opset_imports=source.proto.opset_import)
        feeds = {item.name: self._feeds[item.name] for item in inputs}
        return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])


__all__ = ["mask_rows"]
