"""An opened encoder: token arrays in, outputs out, and micro-batched runs for the methods that take texts."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.engines.session import EncoderSession, EngineInfo, Fallback
from accel.errors import InputError
from accel.runtime.batching import WAVE_BYTES, Row, SessionGuard, Stopwatch, build_feeds, plan_batches, waves
from accel.runtime.encoder_inputs import TokenInputs, check_count
from accel.runtime.failover import Failover, Opened
from accel.runtime.results import Timings, TruncationReport
from accel.runtime.sentence import SentenceConfig
from accel.runtime.spans import SpanTokenizer
from accel.runtime.tokenizer_files import read_object
from accel.spec import ArchSpec

if TYPE_CHECKING:
    from accel.runtime.text import Tokenizer

PROGRESS_TEXTS = 512  # shorter lists are over before a bar says anything
PROGRESS_WAVE_BYTES = 8 << 20  # smaller waves while a bar is shown, so that it moves
_METHODS = {
    "feature-extraction": "embed",
    "text-classification": "classify",
    "token-classification": "entities",
    "question-answering": "answer",
    "fill-mask": "fill_mask",
}
Consumer = Callable[[list[int], "NDArray[np.int64] | None", dict[str, NDArray]], None]


class TruncationWarning(UserWarning):
    """Texts were cut to the model's longest input."""


class EncoderOutput(Mapping[str, NDArray]):
    """The outputs of one call, by name and as attributes.

    Attributes:
        timings: Where the call's time went.
        last_hidden_state: float32 [B, S, H] (feature extraction).
        logits: float32 [B, C], [B, S, C] or [B, S, V] (classification, token classification, fill-mask).
        start_logits, end_logits: float32 [B, S] (question answering).
    """

    __slots__ = ("_values", "_watch")

    def __init__(self, values: dict[str, NDArray], watch: Stopwatch) -> None:
        self._values, self._watch = values, watch

    @property
    def timings(self) -> Timings:
        return self._watch.timings

    def __getitem__(self, name: str) -> NDArray:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> NDArray:
        if name.startswith("_"):  # copy and pickle ask before there are values
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(f"This output has no {name!r}; it has: {', '.join(self._values)}")
        return self._values[name]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(value.shape)}" for name, value in self._values.items())
        return f"EncoderOutput({shapes})"


class EncoderCore:
    """The part of an encoder that does not depend on its task.

    Args:
        bundle: The opened bundle.
        opened: The session and the engines that were passed over; closed with the encoder.
    """

    def __init__(self, bundle: Bundle, opened: Opened) -> None:
        self.bundle = bundle
        self._failover: Failover[EncoderSession] = Failover(opened)
        self.config: dict[str, Any] = read_object(bundle, "config.json")
        self._guard = SessionGuard(self._failover)
        self._local = threading.local()
        self._with_type_ids = "token_type_ids" in self._input_names()
        self._inputs = TokenInputs(
            self.arch.vocab_size, self.arch.max_positions, self._with_type_ids, self.config.get("type_vocab_size")
        )

    def _input_names(self) -> set[str]:
        graphs = self.bundle.manifest.variants[self.engine.variant].graphs
        return {spec.name for graph in graphs.values() for spec in graph.inputs}

    @property
    def engine(self) -> EngineInfo:
        """What runs."""
        return self._failover.engine

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Engines that were passed over or broke, and why."""
        return self._failover.fallbacks

    @property
    def arch(self) -> ArchSpec:
        """The model's architecture."""
        return self.bundle.manifest.arch

    @property
    def last_timings(self) -> Timings | None:
        """Where the time of this thread's last call on this encoder went; None before the first one."""
        watch: Stopwatch | None = getattr(self._local, "watch", None)
        return None if watch is None else watch.timings

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, loaded when first needed."""
        from accel.runtime.text import Tokenizer

        return Tokenizer.from_bundle(self.bundle)

    @cached_property
    def sentence_config(self) -> SentenceConfig:
        """What sentence-transformers' files in the bundle say."""
        return SentenceConfig.from_bundle(self.bundle)

    @cached_property
    def _spans(self) -> SpanTokenizer:
        return SpanTokenizer(self.bundle)

    @cached_property
    def max_length(self) -> int:
        """Tokens per text, special tokens included; longer texts are cut."""
        limit = self.sentence_config.max_length or self.tokenizer.settings.model_max_length
        return min(limit or self.arch.max_positions, self.arch.max_positions)

    def __call__(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> EncoderOutput:
        """Runs the model on token ids.

        Args:
            input_ids: Integers [B, S]: NumPy, nested lists, or a torch tensor. Padding may be any id of the vocabulary.
            attention_mask: [B, S], 1 keeps a token, 0 marks padding. None: all ones.
            token_type_ids: Integers [B, S]. None: all zero.

        Raises:
            InputError: Wrong dtype, rank or shape; an empty batch; ids outside the vocabulary; a sequence longer than
                the model's positions; a mask with other values than 0 and 1, or with a row of zeros.
            EngineError: The engine failed, the encoder is closed, or this process was forked after loading.
            EngineUnavailableError: The engine broke, and none is left.
        """
        watch = Stopwatch()
        feeds = self._inputs.prepare(input_ids, attention_mask, token_type_ids)
        watch.lap_prepost()
        with self._guard as guard:
            watch.lap_system()
            values = guard.run(feeds, watch)
            watch.lap_compute()
        self._finish(watch)
        return EncoderOutput(values, watch)

    def close(self) -> None:
        """Waits for the calls in flight and frees the session; safe to call twice."""
        self._guard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        engine = self.engine
        return f"{type(self).__name__}({self.arch.architecture}, {self.arch.task}, {engine.name}, {engine.variant})"

    def _require(self, task: str, method: str, batch_size: int | None = None) -> None:
        """Raises InputError for a method of another task, or a bad batch size."""
        if self.arch.task != task:
            right = _METHODS.get(self.arch.task, "__call__")
            what = f".{method}() needs a model for {task}; this one is for {self.arch.task}"
            raise InputError(what, where=method, remedy=f"Use .{right}(), or call the encoder with ids for its outputs")
        check_count(batch_size, "batch_size")

    def _finish(self, watch: Stopwatch) -> None:
        """The end of a call: what is left is post-processing, and the record is this thread's last one."""
        watch.lap_prepost()
        self._local.watch = watch

    def _encode(self, texts: list[Any], pairs: bool, truncate: bool) -> Sequence[Row]:
        """Token rows of checked texts (or pairs); says what was cut, or refuses to cut."""
        limit = self.max_length
        if self.sentence_config.lowercase:
            texts = [(text[0].lower(), text[1].lower()) if pairs else text.lower() for text in texts]
        rows = self.tokenizer.encode_batch(texts, max_length=limit, pairs=pairs)
        cut = [i for i, row in enumerate(rows) if row[2]]
        if cut:
            whole = self.tokenizer.encode_batch([texts[i] for i in cut], max_length=None, pairs=pairs)
            self._report_cut(cut, len(rows), limit, max(len(row[0]) for row in whole), truncate)
        return rows

    def _report_cut(self, cut: Sequence[int], count: int, limit: int, longest: int, truncate: bool) -> None:
        if not truncate:
            what = f"{len(cut)} of {count} texts are longer than {limit} tokens; the longest has {longest}"
            shown = f"texts {list(cut[:5])}"
            raise InputError(what, where=shown, remedy="Split them, or pass truncate=True to cut them")
        report = TruncationReport(limit, tuple(cut), count)
        warnings.warn(f"{report}; the longest has {longest}", TruncationWarning, stacklevel=4)

    def _run_rows(
        self,
        rows: Sequence[Row],
        consume: Consumer,
        watch: Stopwatch,
        batch_size: int | None = None,
        show_progress: bool | None = None,
    ) -> None:
        """Runs all rows in micro-batches and hands each one's row indices, mask (None: all ones) and outputs on."""
        lengths = [len(row[0]) for row in rows]
        if min(lengths) == 0:
            what = "The tokenizer makes no token of the text"
            raise InputError(what, where=f"texts[{lengths.index(0)}]", remedy="Leave it out")
        batches = plan_batches(lengths, batch_size, pad=not self._guard.side_by_side)
        pad = self.tokenizer.pad_token_id or 0
        width = self.arch.vocab_size if self.arch.task == "fill-mask" else self.arch.hidden_size
        watch.lap_prepost()
        with self._guard as guard, _progress(len(rows), show_progress) as advance:
            held = WAVE_BYTES if advance is None else PROGRESS_WAVE_BYTES
            watch.lap_system()
            for wave in waves(batches, lengths, 4 * width, held):
                indices = [batch.tolist() for batch in wave]
                built = [build_feeds(rows, chosen, pad, self._with_type_ids) for chosen in indices]
                watch.lap_prepost()
                outputs = guard.run_many([feeds for feeds, _ in built], watch)
                watch.lap_compute(len(wave))
                for chosen, (_, mask), output in zip(indices, built, outputs, strict=True):
                    consume(chosen, mask, output)
                watch.lap_prepost()
                if advance is not None:
                    advance(sum(map(len, indices)))
                    watch.lap_system()


@contextmanager
def _progress(count: int, show: bool | None) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on stderr; None when it is not shown (by default: short lists, no terminal)."""
    if not (show if show is not None else count >= PROGRESS_TEXTS and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("Texts", total=count)
        yield lambda done: bar.advance(task, done)


__all__ = ["EncoderCore", "EncoderOutput", "TruncationWarning"]
