"""``accel::CachedAttention`` -> TensorScatter into the caches and Attention over them, rows padded to [B, S].

The caller gives rows of equal length; dense layers see the B * S tokens flat. Per layer:

    key_update, value_update   TensorScatter at each row's ``write_index``: becomes TensorRT's in-place KV update
    scale                      the query times the layer's scale
    attention                  Attention with a bool mask: a query sees the slots up to its own position

The parser multiplies the query and, at every step, the whole key cache by Attention's ``scale``. A product of our
own on the query alone and a scale of 1 let the builder drop both. Causality is a mask, never ``is_causal``, which
means the upper left corner and is wrong for a cache. Softcap has no place in TensorRT's attention: such layers are
written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from accel.graph.checks import attention_nodes
from accel.graph.edit import producer, remove_dead, replace_value, through_reshapes
from accel.graph.lowering.rotary_tables import RotaryTables
from accel.graph.lowering.tensorrt.emit import Dims, Emitter
from accel.spec import ArchSpec, AttentionSpec

HIDDEN = -30000.0  # a masked score: the softmax gives 0, and fp16 holds it


def lower_cached_attention(model: ir.Model, arch: ArchSpec, max_positions: int) -> dict[str, int]:
    """Lowers every attention node in place; returns how many became Attention, and how many rotations use tables."""
    tables = RotaryTables(model, max_positions)
    nodes = attention_nodes(model, "accel", "CachedAttention")
    for rotation in (node for node in model.graph if node.op_type == "RotaryEmbedding"):
        tables.fold(rotation)  # before position_ids change their shape
    step = _StepInputs(model.graph)
    fused = rotated = 0
    for index, (node, layer) in enumerate(zip(nodes, arch.layers, strict=True)):
        lowering = _Layer(node, layer, index, step, tables)
        lowering.lower()
        fused, rotated = fused + (layer.softcap is None), rotated + lowering.rotated
    step.drop_lengths()
    remove_dead(model)
    return {"Attention": fused, "TensorScatter": 2 * len(nodes), "rotary_by_position": rotated}


class _StepInputs:
    """The inputs of a padded step, and what all layers make of them."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._first = graph, graph[0]
        self.emit = Emitter(graph, graph[0])
        self.input_ids, self.position_ids = (self._pad(name) for name in ("input_ids", "position_ids"))
        self.write_index = ir.Value(name="write_index", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B"]))
        lengths = next(i for i, value in enumerate(graph.inputs) if value.name == "past_lengths")
        graph.inputs.insert(lengths, self.write_index)
        self._batch = self.emit("Shape", [self.input_ids], [2], ir.DataType.INT64)
        self._shapes: dict[tuple[int, int], ir.Value] = {}
        self._masks: dict[int | None, ir.Value] = {}

    def _pad(self, name: str) -> ir.Value:
        """Replaces an input [T] by one [B, S] of the same name, flattened for those that read it."""
        old = next(value for value in self._graph.inputs if value.name == name)
        new = ir.Value(name=name, type=old.type, shape=ir.Shape(["B", "S"]))
        flat = self.emit("Reshape", [new, self.emit.ints(-1)], ["T"], ir.DataType.INT64)
        old.name = f"{name}_flat"
        ir.convenience.replace_all_uses_with(old, flat)
        self._graph.inputs[self._graph.inputs.index(old)] = new
        return new

    def drop_lengths(self) -> None:
        """Removes the inputs that only the packed form needs."""
        for name in ("past_lengths", "query_lengths"):
            self._graph.inputs.remove(next(value for value in self._graph.inputs if value.name == name))

    def heads_shape(self, heads: int, dim: int) -> ir.Value:
        """int64 [4]: B, S, heads, dim."""
        if (heads, dim) not in self._shapes:
            made = self.emit("Concat", [self._batch, self.emit.ints(heads, dim)], [4], ir.DataType.INT64, axis=0)
            self._shapes[heads, dim] = made
        return self._shapes[heads, dim]

    def mask(self, window: int | None, cache: ir.Value) -> ir.Value:
        """bool [B, 1, S, C]: which slots a query sees."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window, cache)
        return self._masks[window]

    def _make_mask(self, window: int | None, cache: ir.Value) -> ir.Value:
        emit, shape, int64, boolean = self.emit, ("B", 1, "S", "C"), ir.DataType.INT64, ir.DataType.BOOL
        size = emit("Squeeze", [emit("Shape", [cache], [1], int64, start=2, end=3), emit.ints(0)], [], int64)
        slots = emit("Range", [emit.int(0), size, emit.int(1)], ["C"], int64)
        own = emit("Unsqueeze", [self.position_ids, emit.ints(1, 3)], ["B", 1, "S", 1], int64)
        visible = emit("LessOrEqual", [slots, own], shape, boolean)
        if window is None:
            return visible
        oldest = emit("Sub", [own, emit.int(window)], ["B", 1, "S", 1], int64)
        return emit("And", [visible, emit("Greater", [slots, oldest], shape, boolean)], shape, boolean)


@dataclass
class _Layer:
    node: ir.Node
    layer: AttentionSpec
    index: int
    step: _StepInputs
    tables: RotaryTables
    rotated: int = 0

    def lower(self) -> None:
        graph, layer = self.node.graph, self.layer
        assert isinstance(graph, ir.Graph)
        self.emit = Emitter(graph, self.node)
        query, key, value = self.node.inputs[:3]
        past = self.node.inputs[3:5]
        queries = self._heads(query, layer.heads)
        scale = self.emit.number(f"{self._name('scale')}.value", layer.scale)
        scaled = self.emit("Mul", [queries, scale], queries.shape or (), name=self._name("scale"))
        new = [self._heads(item, layer.kv_heads) for item in (key, value)]
        present = [self._update(*update) for update in zip(past, new, ("key", "value"), strict=True)]
        mask = self.step.mask(layer.window, past[0])  # type: ignore[arg-type]
        attended = self._attend(scaled, present[0], present[1], mask)
        rows = self.emit("Transpose", [attended], ["B", "S", layer.heads, layer.head_dim], perm=[0, 2, 1, 3])
        width = layer.heads * layer.head_dim
        flat = self.emit("Reshape", [rows, self.emit.ints(-1, width)], ["T", width])
        for before, after in zip(self.node.outputs, (flat, *present), strict=True):
            replace_value(before, after)
        graph.remove(self.node, safe=True)

    def _name(self, part: str) -> str:
        return f"layers.{self.index}.{part}"

    def _heads(self, value: ir.Value | None, heads: int) -> ir.Value:
        """A projection [.., T, heads * D] as [B, heads, S, D], rotated there if it was rotated before."""
        source, rotation = through_reshapes(value), None
        node = producer(source, "RotaryEmbedding")
        found = None if node is None else self.tables.fold(node)
        if node is not None and found is not None:
            source, rotation = through_reshapes(node.inputs[0]), node
        dim = self.layer.head_dim
        rows = self.emit("Reshape", [source, self.step.heads_shape(heads, dim)], ["B", "S", heads, dim])
        turned = self.emit("Transpose", [rows], ["B", heads, "S", dim], perm=[0, 2, 1, 3])
        if rotation is None or found is None:
            return turned
        self.rotated += 1
        order, part = (rotation.attributes.get_int(name, 0) for name in ("interleaved", "rotary_embedding_dim"))
        operands = [turned, *found, self.step.position_ids]
        shape = turned.shape or ()
        return self.emit("RotaryEmbedding", operands, shape, interleaved=order, rotary_embedding_dim=part)

    def _update(self, past: ir.Value | None, new: ir.Value, part: str) -> ir.Value:
        assert past is not None and past.shape is not None
        operands = [past, new, self.step.write_index]
        return self.emit("TensorScatter", operands, past.shape, name=self._name(f"{part}_update"), axis=-2)

    def _attend(self, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value) -> ir.Value:
        """[B, H, S, D] from a scaled query."""
        shape, name = ["B", self.layer.heads, "S", self.layer.head_dim], self._name("attention")
        if self.layer.softcap is None:
            return self.emit("Attention", [query, key, value, mask], shape, name=name, scale=1.0)
        return self._attend_capped(query, key, value, mask)

    def _attend_capped(self, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value) -> ir.Value:
        """The same written out, with ``softcap * tanh(scores / softcap)``."""
        emit, kv, dim, heads = self.emit, self.layer.kv_heads, self.layer.head_dim, self.layer.heads
        assert self.layer.softcap is not None
        groups = heads // kv
        all_scores: Dims = ("B", kv, groups, "S", "C")
        grouped = emit("Reshape", [query, emit.ints(0, kv, groups, -1, dim)], ("B", kv, groups, "S", dim))
        keys = emit("Unsqueeze", [key, emit.ints(2)], ("B", kv, 1, "C", dim))
        keys = emit("Transpose", [keys], ("B", kv, 1, dim, "C"), perm=[0, 1, 2, 4, 3])
        values = emit("Unsqueeze", [value, emit.ints(2)], ("B", kv, 1, "C", dim))
        cap = emit.number(self._name("softcap.value"), self.layer.softcap)
        scores = emit("MatMul", [grouped, keys], all_scores)
        bounded = emit("Tanh", [emit("Div", [scores, cap], all_scores)], all_scores)
        capped = emit("Mul", [bounded, cap], all_scores)
        visible = emit("Unsqueeze", [mask, emit.ints(1)], ("B", 1, 1, "S", "C"), ir.DataType.BOOL)
        masked = emit("Where", [visible, capped, emit.number("hidden_score", HIDDEN)], all_scores)
        weights = emit("Softmax", [masked], all_scores, axis=-1)
        mixed = emit("MatMul", [weights, values], ("B", kv, groups, "S", dim), name=self._name("attention"))
        return emit("Reshape", [mixed, emit.ints(0, heads, -1, dim)], ("B", heads, "S", dim))


__all__ = ["HIDDEN", "lower_cached_attention"]
