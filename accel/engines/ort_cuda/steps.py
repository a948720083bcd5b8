"""The bindings of decoder runs: every address fixed where a run comes again, as a CUDA graph wants them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.ort_cuda.feeds import Feeds
from accel.engines.ort_cuda.provider import ITEM_BYTES, ONNX_TYPES, Provider

HOST = ("step_shape", "total_length")  # kernels read these on the host
ROW_BYTES = 4096


@dataclass(frozen=True)
class Caches:
    """The decoder's keys and values on the device.

    Attributes:
        memory: ``{layer}.{key or value}`` -> OrtValue over its memory.
        shapes: Likewise -> (rows, heads, capacity, head_dim).
        dtype: Of all.
    """

    memory: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str

    def address(self, name: str, row: int) -> int:
        """Where a row begins."""
        return int(self.memory[name].data_ptr()) + row * self.row_size(name) * ITEM_BYTES[self.dtype]

    def row_size(self, name: str) -> int:
        """Elements of one row."""
        return prod(self.shapes[name][1:])

    def bind(self, io: Any, provider: Provider, first: int, rows: int) -> None:
        """Binds rows as past and, the same memory, as present."""
        kind = ONNX_TYPES[self.dtype]
        for name, shape in self.shapes.items():
            place = provider.device, provider.index, kind, [rows, *shape[1:]], self.address(name, first)
            io.bind_input(f"past.{name}", *place)
            io.bind_output(f"present.{name}", *place)


class StepBinding:
    """One shape of run over some rows, its inputs allocated once.

    Args:
        provider: Where it runs.
        session: The ONNX Runtime session.
        caches: All rows.
        first: The first row that it covers.
        feeds: A run of that shape.
        outputs: Where ``logits``, ``token`` and ``token_logit`` go: at least as many rows as the run asks for.
        vocabulary: Columns of the logits.
    """

    def __init__(
        self, provider: Provider, session: Any, caches: Caches, first: int, feeds: Feeds, outputs: Mapping[str, Any],
        vocabulary: int,
    ) -> None:  # fmt: skip
        self._session, self.io = session, session.io_binding()
        wanted = {node.name for node in session.get_inputs()}
        rows, asked = len(feeds["seqlens_k"]), len(feeds["logits_positions"])
        self._held = {name: np.array(feeds[name]) for name in feeds if name in wanted}
        self._inputs: dict[str, Any] = {}
        for name, array in self._held.items():
            self._inputs[name] = provider.host(array) if name in HOST else provider.upload(array)
            self.io.bind_ortvalue_input(name, self._inputs[name])
        place = provider.device, provider.index
        kinds = {"logits": ONNX_TYPES["float32"], "token": np.int64, "token_logit": ONNX_TYPES["float32"]}
        for name, kind in kinds.items():
            shape = [asked, vocabulary] if name == "logits" else [asked]
            self.io.bind_output(name, *place, kind, shape, int(outputs[name].data_ptr()))
        self._asked, self._outputs = asked, outputs
        caches.bind(self.io, provider, first, rows)

    def fill(self, feeds: Feeds) -> None:
        """Writes another run's values; those that stayed as they are stay on the device."""
        for name, held in self._held.items():
            if np.array_equal(held, feeds[name]):
                continue
            if name not in HOST:  # at first: a copy that fails is made again when the run is
                self._inputs[name].update_inplace(np.ascontiguousarray(feeds[name], held.dtype))
            held[...] = feeds[name]

    def run(self, options: Any = None) -> None:
        """Runs it."""
        self._session.run_with_iobinding(self.io, options)

    def logits(self) -> NDArray[np.float32]:
        """float32 [R, V], copied to the host."""
        found: NDArray[np.float32] = self.io.get_outputs()[0].numpy()
        return found

    def best(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """int64 [R], the best tokens, and float32 [R], their logits; copied to the host."""
        # Not from the binding, which makes objects of all outputs, the caches among them, at every step.
        tokens, logits = (self._outputs[name].numpy()[: self._asked] for name in ("token", "token_logit"))
        return tokens, logits


__all__ = ["Caches", "StepBinding"]
