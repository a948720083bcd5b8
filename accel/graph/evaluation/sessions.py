"""Sessions over a graph in padded layout, computed by whatever runs graphs: PyTorch or ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.engines.ort_cuda.feeds import mask_feeds, step_feeds
from accel.engines.padded import PaddedStep, StepPadder
from accel.engines.session import EngineInfo, StepInputs
from accel.spec import ArchSpec

Run = Callable[[Mapping[str, NDArray]], dict[str, NDArray]]  # graph inputs by name -> graph outputs by name


def onnxruntime_run(path: Path, threads: int = 0) -> Run:
    """Runs a graph file on ONNX Runtime's CPU kernels, without its graph optimisations; what it does not take is
    left out."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = {node.name for node in session.get_inputs()}

    def run(feeds: Mapping[str, NDArray]) -> dict[str, NDArray]:
        given = {name: array for name, array in feeds.items() if name in taken}
        return dict(zip(names, session.run(None, given), strict=True))

    return run


class PaddedDecoder:
    """Implements ``accel.engines.session.DecoderSession`` over a graph of TensorRT's dialect; caches are copied.

    Args:
        run: Computes the graph.
        arch: The model's.
        rows: Cache rows.
        capacity: Slots per row.
        dtype: Of the caches.
        max_logits: Most logits per run; None: any number.
    """

    mixed_steps = True

    def __init__(
        self,
        run: Run,
        arch: ArchSpec,
        rows: int,
        capacity: int,
        dtype: ir.DataType = ir.DataType.FLOAT,
        max_logits: int | None = None,
    ) -> None:
        self.max_batch, self.capacity, self.vocab_size = rows, capacity, arch.vocab_size
        self.info = EngineInfo("graph", "", "cpu", dtype.name.lower(), 0)
        self._run = run
        self._padder = StepPadder(rows, capacity, [rows], max_logits=max_logits)
        self._caches = {
            f"{index}.{part}": np.zeros((rows, layer.kv_heads, capacity, layer.head_dim), dtype.numpy())
            for index, layer in enumerate(arch.layers)
            for part in ("key", "value")
        }

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See ``DecoderSession.step``."""
        logits = np.full((len(inputs.logits_positions), self.vocab_size), np.nan, np.float32)
        for step in self._padder.split(inputs):
            found = self._step(step)
            asked = step.wanted >= 0
            logits[step.wanted[asked]] = found[asked]
        return logits

    def _step(self, step: PaddedStep) -> NDArray[np.float32]:
        rows = slice(step.first, step.first + len(step.input_ids))
        feeds = self._feeds(step)
        feeds |= {f"past.{name}": cache[rows] for name, cache in self._caches.items()}
        outputs = self._run(feeds)
        for name, cache in self._caches.items():
            cache[rows] = outputs[f"present.{name}"]
        return outputs["logits"]

    def _feeds(self, step: PaddedStep) -> dict[str, NDArray]:
        return {name: getattr(step, name) for name in ("input_ids", "position_ids", "write_index", "logits_positions")}

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See ``DecoderSession.copy_row``."""
        self._padder.copied(source, target, length)
        for cache in self._caches.values():
            cache[target, :, :length] = cache[source, :, :length]

    def read_row(self, row: int, length: int) -> dict[str, NDArray]:
        """What a row's first positions hold: ``0.key`` and so on, [KV, length, D]."""
        return {name: cache[row, :, :length] for name, cache in self._caches.items()}

    def close(self) -> None:
        """Nothing is held."""


class GroupedDecoder(PaddedDecoder):
    """The same, with the same arguments, over a graph of the dialect of ONNX Runtime's CUDA provider."""

    def _feeds(self, step: PaddedStep) -> dict[str, NDArray]:
        return step_feeds(step)


class PackedDecoder(PaddedDecoder):
    """The same, with the same arguments, over a graph that takes packed tokens."""

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See ``DecoderSession.step``."""
        feeds: dict[str, NDArray] = {
            name: getattr(inputs, name)
            for name in ("input_ids", "position_ids", "past_lengths", "query_lengths", "logits_positions")
        }
        outputs = self._run({**feeds, **{f"past.{name}": cache for name, cache in self._caches.items()}})
        for name in self._caches:
            self._caches[name] = outputs[f"present.{name}"]
        return outputs["logits"]


class GraphEncoder:
    """Implements ``accel.engines.session.EncoderSession`` over a graph that takes every input."""

    def __init__(self, run: Run, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        self.info = EngineInfo("graph", "", "cpu", dtype.name.lower(), 0)
        self._run = run

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        """See ``EncoderSession.run``."""
        return self._run(feeds)

    def close(self) -> None:
        """Nothing is held."""


class MaskedEncoder(GraphEncoder):
    """The same over a graph of the dialect of ONNX Runtime's CUDA provider."""

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        """See ``EncoderSession.run``; needs ``attention_mask``."""
        return super().run({**feeds, **mask_feeds(feeds["attention_mask"])})


__all__ = [
    "GraphEncoder",
    "GroupedDecoder",
    "MaskedEncoder",
    "PackedDecoder",
    "PaddedDecoder",
    "Run",
    "onnxruntime_run",
]
