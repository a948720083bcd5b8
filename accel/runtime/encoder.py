"""The encoder that users hold: embedding, ranking and the task heads over one opened bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import BundleError, InputError
from accel.runtime import heads
from accel.runtime import pooling as pools
from accel.runtime.batching import Stopwatch
from accel.runtime.encoder_core import EncoderOutput, TruncationWarning
from accel.runtime.encoder_inputs import Text, check_count, check_one_text, check_texts
from accel.runtime.encoder_spans import SpanTasks
from accel.runtime.heads import Answer, Entity, Fill
from accel.runtime.results import Classification


class Encoder(SpanTasks):
    """An opened encoder bundle. Thread-safe; a context manager.

    Call it with token ids for its raw outputs, or use the method for its task: ``embed`` (feature
    extraction), ``classify`` and ``rank`` (text classification), ``entities`` (token
    classification), ``answer`` (question answering), ``fill_mask``. All of them accept texts,
    leave where their time went in ``last_timings``, and raise EngineError after ``close()``.

    When the engine breaks (EngineBrokenError), the next one takes over, with a warning in the log, and what it
    was running is repeated there; ``engine`` and ``fallbacks`` then speak of the new one. Not after loading with
    ``strict`` or an engine's name: the calls then raise the error. Likewise a row longer than the engine was built
    for: the next engine runs such rows, the first one the others.

    Attributes:
        engine: What runs.
        fallbacks: Engines that were passed over, broke, or do not take every run, and why.
        arch: The model's architecture.
        last_timings: Timings of this thread's last call; an EncoderOutput carries its own too.
    """

    def embed(
        self,
        texts: str | Sequence[str],
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        batch_size: int | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: bool = True,
        show_progress: bool | None = None,
        truncate_dim: int | None = None,
    ) -> NDArray[np.float32]:
        """One vector per text, as sentence-transformers makes them.

        Args:
            texts: A text, or several.
            pooling: ``cls``, ``mean``, ``max``, ``mean_sqrt_len``, ``weightedmean``, ``lasttoken``, or several,
                concatenated in this order. None: the model's own, else ``mean``.
            normalize: Scale to unit length. None: as the model's modules.json says, else True.
            batch_size: Texts per micro-batch. None: by a token budget.
            prompt_name: One of the model's prompts, put before each text. None: its default prompt, if it has one.
            prompt: The text to put before each text.
            truncate: Cut texts longer than ``max_length`` tokens, with a TruncationWarning; False: refuse them.
            show_progress: None: on long lists at a terminal.
            truncate_dim: Leading dimensions to keep; scaling comes after.

        Returns:
            float32 [N, D] in the texts' order, or [D] for a single str.

        Raises:
            InputError: No texts, an empty text, a bad option, a text too long with ``truncate=False``, another task.
            BundleError: The model has sentence-transformers modules that are not applied here (Dense, ...).
        """
        watch = Stopwatch()
        self._require("feature-extraction", "embed", batch_size)
        modes = self._pooling_modes(pooling)
        _check_dimension(truncate_dim, len(modes) * self.arch.hidden_size)
        items, single, _ = check_texts(texts)
        prefix = self.sentence_config.resolve_prompt(prompt, prompt_name)
        rows = self._encode([prefix + item for item in items] if prefix else items, False, truncate)
        skip = self._prompt_tokens(prefix) if prefix and not self.sentence_config.include_prompt else 0
        result = np.empty((len(rows), len(modes) * self.arch.hidden_size), np.float32)

        def consume(chosen: list[int], mask: NDArray | None, output: dict[str, NDArray]) -> None:
            result[chosen] = pools.pool(output["last_hidden_state"], mask, modes, skip)

        self._run_rows(rows, consume, watch, batch_size, show_progress)
        vectors = self._finish_vectors(result, normalize, truncate_dim)
        self._finish(watch)
        return vectors[0] if single else vectors

    def _pooling_modes(self, pooling: str | Sequence[str] | None) -> tuple[str, ...]:
        config = self.sentence_config
        if config.unsupported:
            what = f"The model's modules {', '.join(config.unsupported)} are not applied by this runtime"
            remedy = "Call the encoder with ids and apply them to last_hidden_state yourself"
            raise BundleError(what, where="modules.json", remedy=remedy)
        return config.pooling if pooling is None else pools.parse_modes(pooling)

    def _finish_vectors(
        self, vectors: NDArray[np.float32], normalize: bool | None, truncate_dim: int | None
    ) -> NDArray[np.float32]:
        if normalize is None:
            normalize = self.sentence_config.normalize
        if truncate_dim is not None:
            vectors = vectors[:, :truncate_dim]
        return pools.normalize(vectors) if normalize else np.ascontiguousarray(vectors)

    def _prompt_tokens(self, prefix: str) -> int:
        """Leading tokens that a prompt makes: its own and the special ones before it, without a closing one."""
        ids = self.tokenizer.encode_batch([prefix.lower() if self.sentence_config.lowercase else prefix])[0].ids
        return len(ids) - 1 if ids[-1] in self.tokenizer.special_ids else len(ids)

    def similarity(self, a: Any, b: Any) -> NDArray[np.float32]:
        """How alike each vector of ``a`` is to each of ``b``, by the model's own measure (cosine by default).

        Args:
            a: float [N, D] or [D], e.g. from ``embed``.
            b: float [M, D] or [D].

        Returns:
            float32 [N, M]. Distances (euclidean, manhattan) are negated, so that larger is always nearer.

        Raises:
            InputError: Not numbers, another rank, or dimensions that differ.
        """
        left, right = _as_vectors(a, "a"), _as_vectors(b, "b")
        if left.shape[1] != right.shape[1]:
            what = f"a has {left.shape[1]} dimensions, b has {right.shape[1]}"
            raise InputError(what, where="similarity", remedy="Embed both with the same model and truncate_dim")
        return pools.similarity(left, right, self.sentence_config.similarity)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        truncate: bool = True,
        show_progress: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Orders documents by a cross-encoder's score for the query.

        Args:
            query: The query.
            documents: The documents.
            top_k: Keep the best. None: all.
            return_documents: Add each document's ``text``.
            batch_size: Pairs per micro-batch. None: by a token budget.
            truncate: Cut pairs longer than ``max_length`` tokens, with a TruncationWarning; False: refuse them.
            show_progress: None: on long lists at a terminal.

        Returns:
            ``{"corpus_id": index, "score": float}`` and, if asked for, ``"text"``, best first. The score passes the
            activation of the model's sentence-transformers config, else a sigmoid.

        Raises:
            InputError: Empty input, a bad option, another task, or a model with more than one label.
        """
        watch = Stopwatch()
        self._require("text-classification", "rank", batch_size)
        check_one_text(query, "query")
        if isinstance(documents, str):
            raise InputError("documents is a single string", where="documents", remedy="Give a list of strings")
        items, _, _ = check_texts(documents, where="documents")
        check_count(top_k, "top_k")
        rows = self._encode([(query, item) for item in items], True, truncate)
        logits = self._logits(rows, watch, batch_size, show_progress)
        if logits.shape[1] != 1:
            what = f"rank needs a model with one label; this one has {logits.shape[1]}"
            raise InputError(what, where="rank", remedy="Use .classify() on (query, document) pairs")
        scores = heads.activate(logits[:, 0], self.sentence_config.activation or "sigmoid").tolist()
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
        ranked: list[dict[str, Any]] = [{"corpus_id": i, "score": scores[i]} for i in order]
        if return_documents:
            for entry in ranked:
                entry["text"] = items[entry["corpus_id"]]
        self._finish(watch)
        return ranked

    def _logits(self, rows: Sequence[Any], watch: Stopwatch, batch_size: int | None, show: bool | None) -> NDArray:
        """float32 [N, C] logits of whole texts."""
        found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)

        def consume(chosen: list[int], mask: NDArray | None, output: dict[str, NDArray]) -> None:
            for i, row in zip(chosen, output["logits"], strict=True):
                found[i] = row

        self._run_rows(rows, consume, watch, batch_size, show)
        return np.stack(found)

    def classify(
        self,
        texts: Text | Sequence[Text],
        top_k: int | None = 1,
        batch_size: int | None = None,
        truncate: bool = True,
        show_progress: bool | None = None,
    ) -> Any:
        """Labels and their scores.

        The scores are a softmax over the labels; a sigmoid each for multi-label models and for a
        single label; the plain output for ``problem_type`` "regression". On a token
        classification model this is ``entities(texts)``.

        Args:
            texts: A text, or a list of texts or of (first, second) pairs.
            top_k: Labels per text; None: all.
            batch_size: Texts per micro-batch. None: by a token budget.
            truncate: Cut texts longer than ``max_length`` tokens, with a TruncationWarning; False: refuse them.
            show_progress: None: on long lists at a terminal.

        Returns:
            A Classification per text with ``top_k=1``, else a list of them per text, best first; not
            wrapped in a list for a single str.

        Raises:
            InputError: No texts, an empty text, a bad option, another task.
        """
        if self.arch.task == "token-classification":
            if top_k != 1:
                raise InputError("Entities have one label each", where="top_k", remedy="Leave top_k out")
            return self.entities(texts, "simple", batch_size, truncate, show_progress)  # type: ignore[arg-type]
        watch = Stopwatch()
        self._require("text-classification", "classify", batch_size)
        check_count(top_k, "top_k")
        items, single, pairs = check_texts(texts, allow_pairs=True)
        logits = self._logits(self._encode(items, pairs, truncate), watch, batch_size, show_progress)
        labels = heads.read_labels(self.config, logits.shape[1])
        scores = heads.label_scores(logits, self.config.get("problem_type"))
        found: list[list[Classification]] = [heads.top_labels(row, labels, top_k) for row in scores]
        result: list[Any] = [row[0] for row in found] if top_k == 1 else list(found)
        self._finish(watch)
        return result[0] if single else result


def _check_dimension(truncate_dim: int | None, dimension: int) -> None:
    check_count(truncate_dim, "truncate_dim")
    if truncate_dim is not None and truncate_dim > dimension:
        what = f"truncate_dim {truncate_dim} exceeds the {dimension} dimensions"
        raise InputError(what, where="truncate_dim", remedy=f"Give at most {dimension}")


def _as_vectors(value: Any, name: str) -> NDArray[np.float32]:
    """float32 [N, D] of one or several vectors."""
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu().numpy()
    try:
        vectors = np.atleast_2d(np.asarray(value, np.float32))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not an array of numbers", where=name, remedy="Give vectors") from error
    if vectors.ndim != 2:
        raise InputError(f"{name} has shape {vectors.shape}", where=name, remedy="Give [N, D] or [D]")
    return vectors


__all__ = ["Answer", "Encoder", "EncoderOutput", "Entity", "Fill", "TruncationWarning"]
