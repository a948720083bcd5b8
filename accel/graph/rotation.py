"""How keys turn with their position: the tables of each layer's rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.graph.checks import CANONICAL, attention_nodes
from accel.graph.edit import producer, through_reshapes
from accel.graph.lowering.rotary_tables import RotaryTables

_STEPS = 64  # angles of a whole turn, where a layer's own are not known


@dataclass(frozen=True, eq=False)
class KeyRotation:
    """A layer's rotation by position p: channels i and i + R/2 of a head turn by the angle of cos[p, i], sin[p, i].

    Attributes:
        cos: float32 [P, R / 2], of angles alone: a factor that a model puts on its tables is taken out.
        sin: Likewise.
    """

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]

    def turn(self, keys: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
        """Keys [..., D] as they would be ``steps`` positions later; channels beyond R stay."""
        half = self.cos.shape[1]
        cos, sin = self.cos[steps], self.sin[steps]
        first, second = keys[..., :half], keys[..., half : 2 * half]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, keys[..., 2 * half :]], -1)


def key_rotations(model: ir.Model, max_positions: int) -> list[KeyRotation | None]:
    """Each layer's rotation over ``max_positions``; None: its keys do not turn.

    Cases:
        1. The angles are functions of the position alone: the traced graph's own.
        2. They depend on more: every pair of channels turns by the same steps, once around.

    Args:
        model: Canonical; left as it is.
        max_positions: Rows of the tables.
    """
    copied = model.clone()
    tables = RotaryTables(copied, max_positions)
    found: list[KeyRotation | None] = []
    for node in attention_nodes(copied, *CANONICAL["decoder"]):
        rotary = producer(through_reshapes(node.inputs[1]), "RotaryEmbedding")
        found.append(None if rotary is None else _rotation(rotary, tables, node))
    return found


def _rotation(rotary: ir.Node, tables: RotaryTables, node: ir.Node) -> KeyRotation:
    folded = tables.fold(rotary)
    if folded is not None:
        cos, sin = (value.const_value.numpy() for value in folded)  # type: ignore[union-attr]
        size = np.hypot(cos, sin)
        return KeyRotation(cos / size, sin / size)
    cache = node.inputs[3]
    assert cache is not None and cache.shape is not None
    dim = rotary.attributes.get_int("rotary_embedding_dim", 0) or int(cache.shape[3])  # type: ignore[arg-type]
    angles = np.repeat(np.linspace(0, 2 * np.pi, _STEPS, endpoint=False, dtype=np.float32)[:, None], dim // 2, 1)
    return KeyRotation(np.cos(angles), np.sin(angles))


__all__ = ["KeyRotation", "key_rotations"]
