"""What an encoder makes of texts, and how far two encoders' outputs are apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import EngineInfo
from accel.errors import BundleError, EngineError, InputError
from accel.manifest import EncoderFidelity, PhaseTimings
from accel.passages import CHARACTERS
from accel.quality.statistics import cosines, rank_correlation
from accel.quality.text_set import TextSet
from accel.quality.timing import time_call, time_encoder
from accel.runtime.encoder import Encoder, EncoderOutput, TruncationWarning
from accel.runtime.results import Timings

TOGETHER = 16  # texts per call
TIMED = 64  # texts of the timed embedding
Advance = Callable[[int], None]


class Encoded(NamedTuple):
    """One input: its ids and type ids."""

    ids: list[int]
    type_ids: list[int]


@dataclass(frozen=True)
class EncoderPlan:
    """The same inputs for every variant.

    Attributes:
        output: What is compared.
        texts: Texts, or pairs of texts where the task takes such.
        rows: Each of them as ids, cut to the model's length.
        pairs: int64 [P, 2], indices into ``texts`` whose similarity is compared; none for task heads.
    """

    output: Literal["embeddings", "logits"]
    texts: tuple[Any, ...]
    rows: tuple[Encoded, ...]
    pairs: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Tokens that are run."""
        return sum(len(row.ids) for row in self.rows)


class Outputs(NamedTuple):
    """What is compared.

    Attributes:
        vectors: Per text its embedding, or all its logits.
        decisions: int64 [D], what a head decides: the best label of each text, token or masked place, both ends of an
            answer, or each label of a multi-label model.
        scores: float [P], the pairs' similarities, or the only logit of each text.
    """

    vectors: tuple[NDArray[np.float32], ...]
    decisions: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class EncoderObservation:
    """What one variant did with a plan."""

    engine: EngineInfo
    outputs: Outputs
    timings: tuple[PhaseTimings, ...]


def make_plan(encoder: Encoder, text: TextSet, max_tokens: int, new_tokens: int = 0) -> EncoderPlan:
    """Turns texts into inputs for the model's task.

    Question answering and heads of one label (rankers) get the text's pairs, everything else single texts; for
    fill-mask the token in the middle of each is masked.

    Args:
        encoder: Any variant of the model.
        text: Taken in order until there are ``max_tokens``.
        max_tokens: Most tokens to run.
        new_tokens: Of no use to encoders.

    Raises:
        InputError: There is no pair, and the task takes pairs.
        BundleError: A fill-mask model without a mask token, or no tokenizer.
    """
    task = encoder.arch.task
    paired = task == "question-answering" or (task == "text-classification" and _label_count(encoder) == 1)
    longest = encoder.max_length * CHARACTERS
    text_pairs = [(a[:longest], b[:longest]) for a, b in text.pairs]
    texts: list[Any] = list(text_pairs)
    if not paired:
        passages = (passage[:longest] for passage in text.passages)
        texts = list(dict.fromkeys([*(part for pair in text_pairs for part in pair), *passages]))
    texts = texts[:max_tokens]  # each has a token at least
    if not texts:
        what = "The task takes pairs of texts, and there is one text only"
        raise InputError(what, where=text.name, remedy="Give at least two passages")
    lower = encoder.sentence_config.lowercase
    shown = [_lowered(entry) for entry in texts] if lower else texts
    encoded = encoder.tokenizer.encode_batch(shown, max_length=encoder.max_length, pairs=paired)
    total = np.cumsum([len(row.ids) for row in encoded])
    kept = max(1, int(np.searchsorted(total, max_tokens, side="right")))
    rows = tuple(Encoded(list(row.ids), list(row.type_ids)) for row in encoded[:kept])
    if task == "fill-mask":
        rows = tuple(_masked(row, encoder.tokenizer.mask_token_id) for row in rows)
    place = {entry: index for index, entry in enumerate(texts[:kept])}
    pairs = [] if paired else [(place[a], place[b]) for a, b in text_pairs if a in place and b in place]
    embeds = task == "feature-extraction"
    chosen = np.array(pairs if embeds else [], np.int64).reshape(-1, 2)
    return EncoderPlan("embeddings" if embeds else "logits", tuple(texts[:kept]), rows, chosen)


def observe(encoder: Encoder, plan: EncoderPlan, advance: Advance) -> EncoderObservation:
    """Runs the plan and takes the time.

    Args:
        encoder: The model.
        plan: What to run.
        advance: Told of tokens as they are run.

    Raises:
        EngineError: The engine failed, gave NaN or infinity, or another one took over meanwhile.
    """
    engine = encoder.engine
    outputs = _embed(encoder, plan, advance) if plan.output == "embeddings" else _run_head(encoder, plan, advance)
    if not all(np.isfinite(vector).all() for vector in outputs.vectors):
        remedy = "The graph is wrong, or values overflow its precision"
        raise EngineError("The outputs hold NaN or infinity", where=f"variant {engine.variant}", remedy=remedy)
    timings = time_encoder(encoder, np.concatenate([np.array(row.ids, np.int64) for row in plan.rows])[:1024])
    if plan.output == "embeddings":
        timed = list(plan.texts[:TIMED])
        timings += (time_call(f"embedding of {len(timed)} texts", lambda: _timed_embed(encoder, timed)),)
    if encoder.engine != engine:
        what = f"{engine.name} broke while it was measured, and {encoder.engine.name} took over"
        raise EngineError(what, where=f"variant {engine.variant}", remedy="Measure again with an engine that holds")
    return EncoderObservation(engine, outputs, timings)


def compare(plan: EncoderPlan, observed: EncoderObservation, reference: EncoderObservation) -> dict[str, Any]:
    """``encoder`` of a ``Quality``."""
    return {"encoder": compare_outputs(plan, observed, reference)}


def compare_to_itself(plan: EncoderPlan, observed: EncoderObservation) -> dict[str, Any]:
    """Nothing: the reference does not differ from itself."""
    return {}


def compare_outputs(plan: EncoderPlan, observed: EncoderObservation, reference: EncoderObservation) -> EncoderFidelity:
    """Cosines, rank correlation, and for heads the logits' error and the decisions that agree."""
    ours, theirs = observed.outputs, reference.outputs
    left, right = ours.vectors, theirs.vectors
    if all(len(vector) == 1 for vector in left):  # one number has no direction: that of all texts together has
        left, right = (np.concatenate(left),), (np.concatenate(right),)
    alike = np.concatenate([cosines(a[None], b[None]) for a, b in zip(left, right, strict=True)])
    error = max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))
    largest = max(float(np.abs(b).max()) for b in right)
    same = ours.decisions == theirs.decisions
    return EncoderFidelity(
        output=plan.output,
        texts=len(plan.texts),
        tokens=plan.tokens,
        cosine_mean=float(alike.mean()),
        cosine_min=float(alike.min()),
        rank_correlation=rank_correlation(ours.scores, theirs.scores),
        pairs=len(ours.scores),
        logit_error=None if plan.output == "embeddings" else error / largest if largest > 0 else error,
        label_agreement=float(same.mean()) if len(same) else None,
        labels=len(same),
    )


def _embed(encoder: Encoder, plan: EncoderPlan, advance: Advance) -> Outputs:
    vectors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # every variant's texts are cut alike
        for start in range(0, len(plan.texts), TOGETHER):
            stop = start + TOGETHER
            vectors.append(encoder.embed(list(plan.texts[start:stop]), show_progress=False))
            advance(sum(len(row.ids) for row in plan.rows[start:stop]))
    table = np.concatenate(vectors)
    similar = encoder.similarity(table, table)[plan.pairs[:, 0], plan.pairs[:, 1]]
    return Outputs(tuple(table), np.zeros(0, np.int64), similar)


def _timed_embed(encoder: Encoder, texts: list[str]) -> Timings:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        encoder.embed(texts, show_progress=False)
    timings = encoder.last_timings
    assert timings is not None, "embed leaves them"
    return timings


def _run_head(encoder: Encoder, plan: EncoderPlan, advance: Advance) -> Outputs:
    """All logits of each text, and what they decide. Rows of like length run together."""
    found: dict[int, tuple[NDArray[np.float32], NDArray[np.int64]]] = {}
    order = sorted(range(len(plan.rows)), key=lambda index: len(plan.rows[index].ids))
    for start in range(0, len(order), TOGETHER):
        chosen = order[start : start + TOGETHER]
        rows = [plan.rows[index] for index in chosen]
        output = _run_rows(encoder, rows)
        for place, (index, row) in enumerate(zip(chosen, rows, strict=True)):
            found[index] = _read_head(encoder, row, output, place)
        advance(sum(len(row.ids) for row in rows))
    vectors, decisions = zip(*(found[index] for index in range(len(plan.rows))), strict=True)
    single = all(len(vector) == 1 for vector in vectors)
    scores = np.concatenate(vectors) if single else np.zeros(0, np.float32)
    return Outputs(vectors, np.concatenate(decisions), scores)


def _run_rows(encoder: Encoder, rows: list[Encoded]) -> EncoderOutput:
    width = max(len(row.ids) for row in rows)
    pad = encoder.tokenizer.pad_token_id or 0
    ids = np.array([row.ids + [pad] * (width - len(row.ids)) for row in rows], np.int64)
    types = np.array([row.type_ids + [0] * (width - len(row.ids)) for row in rows], np.int64)
    mask = np.array([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows], np.int64)
    takes_types = any(
        spec.name == "token_type_ids"
        for graph in encoder.bundle.manifest.variants[encoder.engine.variant].graphs.values()
        for spec in graph.inputs
    )
    return encoder(ids, mask, types if takes_types else None)


def _read_head(
    encoder: Encoder, row: Encoded, output: EncoderOutput, place: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One text's logits, flat, and its decisions."""
    length, task = len(row.ids), encoder.arch.task
    if task == "question-answering":
        ends = [output[name][place, :length] for name in ("start_logits", "end_logits")]
        return np.concatenate(ends), np.array([end.argmax() for end in ends], np.int64)
    logits = output["logits"][place]
    if task == "fill-mask":
        logits = logits[_middle(row)]
    elif task == "token-classification":
        logits = logits[:length]
    kind = encoder.config.get("problem_type")
    if logits.shape[-1] == 1 or kind == "regression":
        return logits.reshape(-1).copy(), np.zeros(0, np.int64)
    decided = logits > 0 if kind == "multi_label_classification" else logits.argmax(-1)
    return logits.reshape(-1).copy(), np.atleast_1d(decided).astype(np.int64)


def _masked(row: Encoded, mask: int | None) -> Encoded:
    if mask is None:
        what, remedy = "The tokenizer has no mask token", "Export the model again with its tokenizer"
        raise BundleError(what, where="tokenizer_config.json", remedy=remedy)
    ids = list(row.ids)
    ids[_middle(row)] = mask
    return Encoded(ids, row.type_ids)


def _middle(row: Encoded) -> int:
    return len(row.ids) // 2


def _label_count(encoder: Encoder) -> int:
    """As transformers counts them: two where the config names none."""
    return len(encoder.config.get("id2label") or (0, 1))


def _lowered(entry: Any) -> Any:
    return tuple(map(str.lower, entry)) if isinstance(entry, tuple) else entry.lower()


__all__ = ["EncoderObservation", "EncoderPlan", "compare", "compare_to_itself", "make_plan", "observe"]
