"""Decoder session on ONNX Runtime: cache bound in place, packed steps, next to no Python per step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.kv_cache import CacheShape
from accel.engines.lifetime import Lifetime
from accel.engines.ort.common import NAME, engine_error, import_onnxruntime, open_graph, translated_errors
from accel.engines.ort.embedding import EmbeddingRows
from accel.engines.session import ChosenTokens, EngineInfo, StepInputs
from accel.errors import BundleError
from accel.manifest import Manifest
from accel.spec import BEST_LOGITS, BEST_TOKENS, EMBEDDING, EMBEDDING_INPUT, ArchSpec

# Types of a graph's caches: NumPy's type, and how many numbers share one of it.
CACHE_TYPES: dict[str, tuple[type[np.generic], int]] = {
    "tensor(float)": (np.float32, 1),
    "tensor(int8)": (np.int8, 1),
    "tensor(uint8)": (np.uint8, 2),
}


class StepBuffers:
    """The small inputs and the outputs of one step shape, bound once and written in place.

    Attributes:
        arrays: Graph input -> its numpy buffer.
        logits: float32 [R, V].
        best: Of each row of logits, where the graph says it.
    """

    def __init__(
        self,
        ort: Any,
        names: set[str],
        rows: int,
        tokens: int,
        width: int,
        logits: NDArray[np.float32],
        embedding: EmbeddingRows | None,
    ) -> None:
        self.rows, self.tokens, self.width, self.logits = rows, tokens, width, logits
        every: dict[str, NDArray] = {
            "input_ids": np.zeros(tokens, np.int64),
            "position_ids": np.zeros(tokens, np.int64),
            "pad_index": np.zeros((rows, width), np.int64),
            "unpad_index": np.arange(tokens, dtype=np.int64),
            "seqlens_k": np.zeros(rows, np.int32),
            "total_length": np.zeros((), np.int32),
            "query_seqlens": np.zeros(rows, np.int32),
            "logits_positions": np.arange(len(logits), dtype=np.int64),
        }
        self._embedding = embedding
        if embedding is not None:
            every[EMBEDDING_INPUT] = np.zeros((tokens, embedding.width), np.float32)
            self._embedded = every[EMBEDDING_INPUT].data.cast("B")
        self.arrays = every
        self.bound = {name: ort.OrtValue.ortvalue_from_numpy(every[name]) for name in every if name in names}
        self.best = ChosenTokens(np.zeros(len(logits), np.int64), np.zeros(len(logits), np.float32))
        outputs = {"logits": logits, BEST_TOKENS: self.best.tokens, BEST_LOGITS: self.best.logits}
        self.bound_outputs = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in outputs.items() if name in names
        }
        self._full = width == 1 and tokens == rows  # every row brings one token: the indices never change
        if self._full:
            every["pad_index"][:, 0] = np.arange(rows)
            every["query_seqlens"].fill(1)
        self._single = self._full and tokens == 1 and len(logits) == 1

    def fill(self, inputs: StepInputs) -> None:
        """Writes one step's values."""
        arrays, rows = self.arrays, self.rows
        if self._single:  # the usual step: next to every run each NumPy call costs microseconds, caches are cold
            length = int(inputs.past_lengths[0])
            if self._embedding is None:
                arrays["input_ids"][0] = inputs.input_ids[0]
            else:
                self._embedding.read_row(int(inputs.input_ids[0]), self._embedded)
            if "position_ids" in self.bound:
                arrays["position_ids"][0] = inputs.position_ids[0]
            arrays["seqlens_k"][0] = length
            arrays["total_length"][()] = length + 1
            return
        if self._embedding is not None:
            self._embedding.read(inputs.input_ids, self._embedded)
        queries, past = inputs.query_lengths[:rows], inputs.past_lengths[:rows]
        arrays["input_ids"][:] = inputs.input_ids
        arrays["position_ids"][:] = inputs.position_ids
        arrays["logits_positions"][:] = inputs.logits_positions
        arrays["query_seqlens"][:] = queries
        lengths = arrays["seqlens_k"]
        np.add(past, queries, out=lengths)
        arrays["total_length"][()] = lengths.max()
        lengths -= 1
        np.maximum(lengths, 0, out=lengths)  # an empty row that sits out still needs a valid length
        if not self._full:
            self._fill_indices(queries)

    def _fill_indices(self, queries: NDArray[np.int32]) -> None:
        if self.width == 1:
            active = np.flatnonzero(queries)
            pad = self.arrays["pad_index"]
            pad.fill(0)
            pad[active, 0] = np.arange(self.tokens)
            self.arrays["unpad_index"][:] = active
            return
        slots = np.arange(self.width)
        real = slots < queries[:, None]
        starts = np.cumsum(queries) - queries
        self.arrays["pad_index"][:] = np.where(real, starts[:, None] + slots, 0)
        self.arrays["unpad_index"][:] = np.flatnonzero(real)


class RowBinding:
    """The IO binding over the first ``rows`` cache rows: past and present are the same memory, bound once."""

    def __init__(self, ort: Any, session: Any, rows: int, caches: dict[str, NDArray]) -> None:
        self.rows = rows
        self.io = session.io_binding()
        for name, cache in caches.items():
            value = ort.OrtValue.ortvalue_from_numpy(cache[:rows])
            self.io.bind_ortvalue_input(f"past.{name}", value)
            self.io.bind_ortvalue_output(f"present.{name}", value)
        self._current: StepBuffers | None = None
        self._kept: dict[tuple[int, int], StepBuffers] = {}  # shapes of one-token steps: they come back

    def find(self, tokens: int, wanted: int) -> StepBuffers | None:
        """The kept buffers of a one-token step."""
        return self._kept.get((tokens, wanted))

    def keep(self, buffers: StepBuffers) -> None:
        """Keeps a one-token step's buffers for the next step of the same shape."""
        self._kept[buffers.tokens, len(buffers.logits)] = buffers

    def bind(self, buffers: StepBuffers) -> None:
        """Makes a step's buffers the bound ones."""
        if buffers is self._current:
            return
        for name, value in buffers.bound.items():
            self.io.bind_ortvalue_input(name, value)
        for name, value in buffers.bound_outputs.items():
            self.io.bind_ortvalue_output(name, value)
        self._current = buffers


class OrtDecoderSession:
    """Implements ``accel.engines.session.DecoderSession`` on the lowered ``ort-cpu`` graph.

    Steps run on the shortest prefix of rows that holds every active one, so a single
    sequence in row 0 pays for one row whatever ``max_batch`` is. The graph says whether caches are float32, int8, or
    int4 in pairs.
    """

    mixed_steps = True

    def __init__(self, path: Path, manifest: Manifest, variant: str, threads: int, shape: CacheShape) -> None:
        """Opens the graph and reserves the cache (its memory is committed as it fills).

        Args:
            path: The graph; its weight files lie beside it.
            manifest: The bundle's.
            variant: Its name, for ``info``.
            threads: Threads of a step, the caller's own included.
            shape: Of the cache.

        Raises:
            DependencyError, EngineError: see ``open_graph``.
            BundleError: The graph's inputs are not those of a lowered decoder.
        """
        self._ort = import_onnxruntime()
        arch = manifest.arch
        self._session: Any = open_graph(path, threads, variant)
        self.info = EngineInfo(NAME, self._ort.__version__, "cpu", variant, threads)
        self.max_batch, self.capacity, self.vocab_size = shape.rows, shape.capacity, arch.vocab_size
        self._names = {node.name for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._check_names(path, arch)
        if {BEST_TOKENS, BEST_LOGITS} <= self._names:  # not in graphs of before
            self.greedy = self._greedy
        self._caches = {
            name: np.zeros((shape.rows, heads, shape.capacity, width), dtype)
            for name, heads, width, dtype in _cache_layouts(self._session, path, arch)
        }
        self._logits = np.zeros((shape.rows, self.vocab_size), np.float32)
        self._bindings: dict[int, RowBinding] = {}
        self._lifetime = Lifetime("decoder")
        self._embedding = _open_embedding(path, self._session, self._names, manifest)  # last: it holds a file

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Runs one packed step; see ``DecoderSession.step``.

        Raises:
            EngineError: ONNX Runtime failed, or the session is closed or was forked.
        """
        return self._run(inputs).logits

    def _greedy(self, inputs: StepInputs) -> ChosenTokens:
        """See ``GreedySession``; raises as ``step``."""
        return self._run(inputs).best

    def _run(self, inputs: StepInputs) -> StepBuffers:
        self._lifetime.check()
        binding, buffers = self._buffers(inputs)
        buffers.fill(inputs)
        binding.bind(buffers)
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:
            raise engine_error(error, "decoder step") from error
        return buffers

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See ``DecoderSession.copy_row``."""
        self._lifetime.check()
        for cache in self._caches.values():
            cache[target, :, :length] = cache[source, :, :length]

    def read_row(self, row: int, length: int) -> dict[str, NDArray]:
        """Copies of a row's first ``length`` positions, [kv_heads, length, W] in the cache's own type.

        Returns:
            By layer and part: ``0.key`` (rotated, where the model rotates keys), ``0.value``, ``1.key`` ...
        """
        self._lifetime.check()
        return {name: cache[row, :, :length].copy() for name, cache in self._caches.items()}

    def cache_pointers(self) -> dict[str, int]:
        """Address of each layer's key and value buffer, by name; they never change."""
        return {name: cache.ctypes.data for name, cache in self._caches.items()}

    def close(self) -> None:
        """Frees the session and the cache. Safe to call twice."""
        if self._lifetime.close():
            self._bindings.clear()
            self._session = None
            self._caches = {}
            if self._embedding is not None:
                self._embedding.close()

    def _buffers(self, inputs: StepInputs) -> tuple[RowBinding, StepBuffers]:
        tokens, wanted = len(inputs.input_ids), len(inputs.logits_positions)
        rows = inputs.rows or int(inputs.query_lengths.nonzero()[0][-1]) + 1
        width = inputs.width or int(inputs.query_lengths.max())
        binding = self._bindings.get(rows)
        if binding is None:
            with translated_errors("binding the cache"):
                binding = self._bindings[rows] = RowBinding(self._ort, self._session, rows, self._caches)
        buffers = binding.find(tokens, wanted) if width == 1 else None
        if buffers is None:
            big = wanted > self.max_batch
            logits = np.empty((wanted, self.vocab_size), np.float32) if big else self._logits[:wanted]
            buffers = StepBuffers(self._ort, self._names, rows, tokens, width, logits, self._embedding)
            if width == 1:
                binding.keep(buffers)
        return binding, buffers

    def _check_names(self, path: Path, arch: ArchSpec) -> None:
        wanted = [f"{side}.{name}" for side in ("past", "present") for name in _cache_names(arch)]
        missing = [name for name in wanted if name not in self._names]
        needed = {"pad_index", "unpad_index", "seqlens_k", "query_seqlens", "logits_positions"}
        missing += sorted(needed - self._names)
        if self._names.isdisjoint({"input_ids", EMBEDDING_INPUT}):
            missing.append("input_ids")
        if missing:
            raise BundleError(
                f"The decoder graph lacks {', '.join(missing[:4])}", where=path.name, remedy="Export the model again"
            )


def _cache_names(arch: ArchSpec) -> list[str]:
    return [f"{index}.{part}" for index in range(len(arch.layers)) for part in ("key", "value")]


def _cache_layouts(session: Any, path: Path, arch: ArchSpec) -> Iterator[tuple[str, int, int, type[np.generic]]]:
    """(layer and part, heads, width of a position, type) of every cache, as the graph says.

    Raises:
        BundleError: A type or a shape that no lowered decoder has.
    """
    inputs = {node.name: node for node in session.get_inputs()}
    for name in _cache_names(arch):
        node, layer = inputs[f"past.{name}"], arch.layers[int(name.partition(".")[0])]
        dtype, per_byte = CACHE_TYPES.get(node.type, (None, 1))
        if dtype is None or list(node.shape[1::2]) != [layer.kv_heads, layer.head_dim // per_byte]:
            what = f"past.{name} is {node.type} {node.shape}, no cache of {layer.kv_heads} heads of {layer.head_dim}"
            raise BundleError(what, where=path.name, remedy="Export the model again")
        yield name, layer.kv_heads, layer.head_dim // per_byte, dtype


def _open_embedding(path: Path, session: Any, names: set[str], manifest: Manifest) -> EmbeddingRows | None:
    """The table whose rows the graph takes as an input; None: the graph looks its ids up itself."""
    if EMBEDDING_INPUT not in names:
        return None
    entry = manifest.parameters.get(session.get_modelmeta().custom_metadata_map.get(EMBEDDING, ""))
    if entry is None:
        what = "The graph takes embedding rows, but names no parameter of the bundle for them"
        raise BundleError(what, where=path.name, remedy="Export the model again")
    return EmbeddingRows(path.parent / entry.file, entry)


__all__ = ["OrtDecoderSession"]
