"""Decoder session on ONNX Runtime's CUDA provider: caches on the device, bound as past and as present."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.capturing import capturing, undisturbed
from accel.engines.gpu_memory import OutOfMemoryError
from accel.engines.kv_cache import CacheShape
from accel.engines.lifetime import Lifetime
from accel.engines.ort_cuda.drawing import open_drawer, table_of
from accel.engines.ort_cuda.feeds import step_feeds
from accel.engines.ort_cuda.memory import Allocator
from accel.engines.ort_cuda.provider import NAME, Provider, may_be_disturbed, run_error
from accel.engines.ort_cuda.rows import RowCopier
from accel.engines.ort_cuda.steps import Caches, StepBinding
from accel.engines.ort_cuda.threads import RunThreads
from accel.engines.padded import PaddedStep, StepPadder
from accel.engines.session import ChosenTokens, Draws, EngineInfo, StepInputs
from accel.errors import AccelError, BundleError, EngineBrokenError
from accel.manifest import Manifest
from accel.scheme import gpu_type

if TYPE_CHECKING:
    from accel.engines.cuda.drawing import Drawer

MAX_TOKENS = 4096  # of one run; more prompts, or a longer one, run in chunks
LEAST_TOKENS = 64  # a chunk that does not fit in memory is halved down to this
MAX_LOGITS = 32  # rows of logits of one run
UNCAPTURED = "-1"  # ONNX Runtime's id of runs that are not
GRAPH_RUNS = 3  # of a new graph: ONNX Runtime may warm up with one, captures, and replays
CAPTURE_TRIES = 8  # what others allocate ends a capture; each of their threads then waits for it
_STEP = "decoder step"  # where errors happen
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Memory:
    """What the session holds on the device beside the graph's weights."""

    caches: Caches
    copier: RowCopier
    logits: Any  # OrtValue over float32 [most rows of logits, V]
    token: Any  # OrtValue int64 [most rows of logits]
    token_logit: Any  # OrtValue float32, likewise


class OrtCudaDecoderSession:
    """Implements ``accel.engines.session.DecoderSession`` on the lowered ``ort-cuda`` graph.

    One-token rows run together, in batches of powers of two; so do neighbours' first prompts of about one length. A
    row with more tokens runs alone else, on its own slice of the cache, in chunks. One-token runs from row 0 on are
    captured as CUDA graphs when the session is opened, and by other threads with their first run of each batch.
    """

    mixed_steps = True
    chunk = MAX_TOKENS

    def __init__(
        self, graph: Path, manifest: Manifest, variant: str, provider: Provider, shape: CacheShape, capture: bool = True
    ) -> None:
        """Opens the graph, reserves the caches and captures the decode batches.

        Args:
            graph: The file; its weights lie beside it.
            manifest: The bundle's.
            variant: Its name in it.
            provider: Where it runs.
            shape: Of the caches.
            capture: Whether one-token runs become CUDA graphs, where the provider has them.

        Raises:
            OutOfMemoryError: The weights or the caches do not fit.
            EngineUnavailableError: See ``Provider.open``.
            BundleError: The graph's inputs are not those of a lowered decoder.
        """
        arch, self._provider, self._graph = manifest.arch, provider, graph
        self.info = EngineInfo(NAME, provider.ort.__version__, f"{provider.device}:{provider.index}", variant, 1)
        self.max_batch, self.capacity, self.vocab_size = shape.rows, shape.capacity, arch.vocab_size
        self.notes: list[str] = []
        self._lifetime = Lifetime("decoder")
        self._broken: EngineBrokenError | None = None
        self._kept: dict[tuple[int, int], StepBinding] = {}
        self._session: Any = None
        self._captures = capture and provider.is_cuda and shape.capacity > 1
        self._threads, self._tries, self._ready = RunThreads(), CAPTURE_TRIES, False
        self._names = [f"{index}.{part}" for index in range(len(arch.layers)) for part in ("key", "value")]
        self._session = self._open()
        self._check_names()
        self._most_logits = max(MAX_LOGITS, shape.rows)
        self._memory = self._allocate(manifest, variant)
        batches = sorted({*(1 << power for power in range(shape.rows.bit_length())), shape.rows})
        self._batches = [size for size in batches if size <= shape.rows]
        most = min(MAX_TOKENS, shape.capacity)
        self._padder = StepPadder(
            shape.rows, shape.capacity, self._batches, (), most, self._most_logits, side_by_side=MAX_TOKENS
        )
        if self._captures:
            with capturing:
                self._capture_batches()
        self._ready = True
        self._drawer = self._open_drawer() if provider.is_cuda else None
        if self._drawer is None:
            self.sample = None  # type: ignore[method-assign,assignment]

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Runs one packed step; see ``DecoderSession.step``.

        Raises:
            EngineError: Closed, used after a fork, or out of memory for one row's chunk.
            EngineBrokenError: CUDA failed; nothing runs on this session again.
        """
        logits = np.empty((len(inputs.logits_positions), self.vocab_size), np.float32)
        for run, binding in self._runs(inputs):
            taken = run.wanted >= 0
            if taken.any():
                logits[run.wanted[taken]] = binding.logits()[taken]
        return logits

    def greedy(self, inputs: StepInputs) -> ChosenTokens:
        """As ``step``, but returns each wanted position's best token; no logits leave the GPU. Raises as ``step``."""
        count = len(inputs.logits_positions)
        best = ChosenTokens(np.empty(count, np.int64), np.empty(count, np.float32))
        for run, binding in self._runs(inputs):
            taken = run.wanted >= 0
            if taken.any():
                tokens, logits = binding.best()
                best.tokens[run.wanted[taken]], best.logits[run.wanted[taken]] = tokens[taken], logits[taken]
        return best

    def sample(self, inputs: StepInputs, draws: Draws) -> ChosenTokens:
        """As ``greedy``, with tokens drawn as ``draws`` says; None where the kernels that draw do not run.

        Raises as ``step``.
        """
        self._check()
        assert self._drawer is not None, "no such method then"
        count = len(inputs.logits_positions)
        found = ChosenTokens(np.empty(count, np.int64), np.empty(count, np.float32))
        for run, _ in self._runs(inputs):
            taken = run.wanted >= 0
            if taken.any():
                table = table_of(draws, run.wanted)
                with self._breaking():
                    tokens, logits = undisturbed(partial(self._drawer.draw, table))
                found.tokens[run.wanted[taken]], found.logits[run.wanted[taken]] = tokens[taken], logits[taken]
        return found

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See ``DecoderSession.copy_row``; copies the whole row. Raises as ``step`` does."""
        self._check()
        caches = self._memory.caches
        with self._breaking():
            for name in self._names:
                here, there = caches.address(name, source), caches.address(name, target)
                undisturbed(partial(self._memory.copier.copy, here, there, caches.row_size(name)))
        self._padder.copied(source, target, length)

    def cache_pointers(self) -> dict[str, int]:
        """Device address of each layer's key and value buffer, by name; they never change."""
        return {name: self._memory.caches.address(name, 0) for name in self._names}

    def close(self) -> None:
        """Frees the caches and the session. Safe to call twice."""
        if self._lifetime.close() and not self._lifetime.forked:
            self._kept.clear()
            if self._drawer is not None:
                self._drawer.close()
            self._session = self._drawer = None
            del self._memory
            self._threads.close()

    # Opening

    def _open(self) -> Any:
        if self._captures:
            try:
                return self._provider.open(self._graph, capture=True)
            except OutOfMemoryError:
                raise
            except AccelError as error:
                self._note_uncaptured(str(error))
        return self._provider.open(self._graph)

    def _check_names(self) -> None:
        inputs, outputs = ({node.name for node in nodes} for nodes in self._ends())
        missing = [f"past.{name}" for name in self._names if f"past.{name}" not in inputs]
        missing += [f"present.{name}" for name in self._names if f"present.{name}" not in outputs]
        needed = {"input_ids", "step_shape", "seqlens_k", "total_length", "logits_positions"}
        missing += sorted((needed - inputs) | ({"logits", "token", "token_logit"} - outputs))
        if missing:
            what = f"The decoder graph lacks {', '.join(missing[:4])}"
            raise BundleError(what, where=self._graph.name, remedy="Add the variant again: accel quantize")

    def _ends(self) -> tuple[list[Any], list[Any]]:
        return self._session.get_inputs(), self._session.get_outputs()

    def _allocate(self, manifest: Manifest, variant: str) -> _Memory:
        dtype, provider = gpu_type(variant, manifest.variants[variant].dtype), self._provider
        allocator, layers = Allocator(provider), (layer for layer in manifest.arch.layers for _ in range(2))
        shapes = {
            name: (self.max_batch, layer.kv_heads, self.capacity, layer.head_dim)
            for name, layer in zip(self._names, layers, strict=True)
        }
        caches = {name: allocator.allocate(shape, dtype) for name, shape in shapes.items()}
        logits = allocator.allocate((self._most_logits, self.vocab_size), "float32")
        token, logit = (provider.upload(np.zeros(self._most_logits, kind)) for kind in (np.int64, np.float32))
        return _Memory(Caches(caches, shapes, dtype), RowCopier(provider, dtype), logits, token, logit)

    def _capture_batches(self) -> None:
        """Runs every decode batch until its graph is there. Only before the first step: it writes into the caches."""
        empty = np.zeros(self.max_batch, np.int32)
        while self._captures and (missing := {*self._batches} - self._threads.graphs()):
            taking = empty.copy()
            taking[: (count := min(missing))] = 1
            ids = np.zeros(count, np.int64)
            for _part in self._runs(StepInputs(ids, ids, taking, empty, np.arange(count))):
                del _part  # it holds the session

    def _open_drawer(self) -> Drawer | None:
        """What draws tokens on the device, its kernels compiled; None: the host does."""
        address, rows = int(self._memory.logits.data_ptr()), self._most_logits
        drawer = None
        try:
            drawer = undisturbed(partial(open_drawer, address, rows, self.vocab_size, self._provider.index))
            for count in self._batches:
                undisturbed(partial(drawer.draw, np.tile([1.0, 0.0, 1.0, 0.0, 0.0], (count, 1))))
            return drawer
        except AccelError as error:
            why = error.what if error.__cause__ is None else str(error.__cause__)
        if drawer is not None:
            drawer.close()
        self.notes.append(f"Tokens are drawn on the host, as the kernels for that do not run here: {why}")
        _log.info("%s: %s", NAME, self.notes[-1])
        return None

    # Running

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """An error after which nothing runs on this session again is kept."""
        try:
            yield
        except EngineBrokenError as error:
            self._broken = error
            raise

    def _check(self) -> None:
        self._lifetime.check()
        if self._broken is not None:
            raise self._broken

    def _runs(self, inputs: StepInputs) -> Iterator[tuple[PaddedStep, StepBinding]]:
        """Runs a step's parts; yields each with the binding that holds its outputs until the next one."""
        self._check()
        for run in self._padder.split(inputs):
            yield from self._run(run)

    def _run(self, run: PaddedStep) -> Iterator[tuple[PaddedStep, StepBinding]]:
        """Runs a part; one that does not fit in memory in halves, a chunk after the other."""
        try:
            with self._breaking():
                binding = self._run_whole(run)
        except OutOfMemoryError:
            rows, width = run.input_ids.shape
            if width == 1 or (rows == 1 and width < 2 * LEAST_TOKENS):  # rows of one token have a graph as they are
                raise
            for half in halves(run):
                yield from self._run(half)
            return
        yield run, binding

    def _run_whole(self, run: PaddedStep) -> StepBinding:
        feeds, graph = step_feeds(run), None
        if self._captures and run.input_ids.shape[1] == 1 and run.first == 0:
            graph = len(run.input_ids)
            feeds["total_length"] = np.array(self.capacity, np.int32)  # what lay on the host stays in the graph
        try:
            if graph is None or graph in self._threads.graphs():
                return undisturbed(partial(self._run_bound, run, feeds, graph), suspects=may_be_disturbed)
            with capturing:
                return self._capture(run, feeds, graph)
        except AccelError:
            raise
        except Exception as error:
            raise run_error(error, _STEP) from error

    def _capture(self, run: PaddedStep, feeds: dict[str, NDArray], graph: int) -> StepBinding:
        """Runs it until its graph is there: each time writes the same. Where that fails, in a new session or without.

        Raises:
            EngineBrokenError: There is no new session.
            Exception: As without a graph.
        """
        while self._captures:
            self._run_bound(run, feeds, None)  # a fault of its own shows here, and memory that is full
            try:
                return self._run_captured(run, feeds, graph)
            except Exception as error:
                why = run_error(error, _STEP).with_traceback(None)
            self._reopen(str(why))  # not while the error is handled: its frames hold the session
            if isinstance(why, OutOfMemoryError):
                raise why
        return self._run_bound(run, feeds, None)

    def _run_captured(self, run: PaddedStep, feeds: dict[str, NDArray], graph: int) -> StepBinding:
        for _ in range(GRAPH_RUNS):
            binding = self._run_bound(run, feeds, graph)
        self._threads.graphs().add(graph)
        if self._ready:  # until then each try counts: a new session has none of the graphs that were there
            self._tries = CAPTURE_TRIES
        return binding

    def _reopen(self, why: str) -> None:
        """Opens the graph again after a capture that failed, with captures while tries are left."""
        what = "the graph could not be opened again after a capture had failed"
        self._broken = EngineBrokenError(what, where=_STEP, remedy="Load the bundle again")  # if it is interrupted
        _log.info("%s: CUDA graphs could not be captured: %s", NAME, why)
        self._tries -= 1
        if not self._tries:
            self._note_uncaptured(why)
        self._kept.clear()
        self._threads.forget()
        self._session = None  # its memory first
        try:
            self._session = self._open()
        except AccelError as error:
            if not self._ready:
                raise
            raise EngineBrokenError(f"{what}: {error.what}", where=error.where, remedy=error.remedy) from error
        self._broken = None

    def _run_bound(self, run: PaddedStep, feeds: dict[str, NDArray], graph: int | None) -> StepBinding:
        """Runs what belongs to a graph, or to none."""
        binding = self._bind(run, feeds)
        if not self._captures:
            binding.run(None)
            return binding
        options = self._provider.ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", UNCAPTURED if graph is None else str(graph))
        self._threads.call(binding.run, options)
        return binding

    def _bind(self, run: PaddedStep, feeds: dict[str, NDArray]) -> StepBinding:
        rows, width = run.input_ids.shape
        kept = self._kept.get((run.first, rows)) if width == 1 else None
        if kept is not None:
            kept.fill(feeds)
            return kept
        memory = self._memory
        outputs = {"logits": memory.logits, "token": memory.token, "token_logit": memory.token_logit}
        made = StepBinding(self._provider, self._session, memory.caches, run.first, feeds, outputs, self.vocab_size)
        if width == 1:
            self._kept[run.first, rows] = made
        return made

    def _note_uncaptured(self, why: str) -> None:
        """From here on runs are not captured."""
        self._captures = False
        self.notes.append(f"CUDA graphs are off: {why}")
        _log.warning("%s: %s", NAME, self.notes[-1])


def halves(run: PaddedStep) -> Iterator[PaddedStep]:
    """Half of a run's rows and then the others, or a row's tokens as two runs, one after the other.

    Both give logits, though nobody may ask for the first's.
    """
    rows, width = run.input_ids.shape
    if rows > 1:
        middle = rows // 2
        yield _part(run, slice(0, middle), slice(0, width), 0)
        yield _part(run, slice(middle, rows), slice(0, width), middle * width)
    else:
        middle = width // 2
        yield _part(run, slice(0, 1), slice(0, middle), 0)
        yield _part(run, slice(0, 1), slice(middle, width), middle)


def _part(run: PaddedStep, rows: slice, columns: slice, start: int) -> PaddedStep:
    """Some rows or columns of a run; ``start``: its tokens before them."""
    ids, own = run.input_ids[rows, columns], run.position_ids[rows, columns]
    positions = run.logits_positions - start
    inside = (positions >= 0) & (positions < ids.size)
    positions, wanted = positions[inside], run.wanted[inside]
    if not positions.size:
        positions, wanted = np.zeros(1, np.int64), np.full(1, -1, np.int64)
    return PaddedStep(run.first + rows.start, ids, own, run.write_index[rows] + columns.start, positions, wanted)


__all__ = ["OrtCudaDecoderSession", "halves"]
