"""From a task head's logits to labels, entities, answers and fills. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.runtime.results import Classification

AGGREGATIONS = ("simple", "first", "none")


@dataclass(frozen=True)
class Entity:
    """A labelled stretch of a text.

    Attributes:
        label: The config's label; without its ``B-``/``I-`` prefix when tokens were grouped.
        score: Mean probability of its tokens' labels.
        start: First character.
        end: One past the last character.
        text: ``text[start:end]`` of the input.
    """

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Answer:
    """A stretch of the context: characters ``start`` to ``end``, and the probability of its two borders."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Fill:
    """One candidate for a mask: its token id, its text, its probability, and the whole text with it filled in."""

    id: int
    token: str
    score: float
    sequence: str


def softmax(logits: NDArray) -> NDArray[np.float32]:
    """Along the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def sigmoid(logits: NDArray) -> NDArray[np.float32]:
    """Without overflow for large negative logits."""
    tail = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + tail), tail / (1 + tail))


def activate(scores: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Applies a cross-encoder's activation: ``sigmoid``, ``identity``, ``tanh`` or ``relu``."""
    if name == "sigmoid":
        return sigmoid(scores)
    if name == "tanh":
        return np.tanh(scores)
    return np.maximum(scores, 0) if name == "relu" else scores


def read_labels(config: dict[str, Any], count: int) -> list[str]:
    """The config's label names, ``LABEL_i`` where it has none."""
    names = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
    return [names.get(i, f"LABEL_{i}") for i in range(count)]


def label_scores(logits: NDArray[np.float32], problem_type: str | None) -> NDArray[np.float32]:
    """Scores [..., C]: the logits for ``regression``, sigmoids for multi-label or one-label models, else a softmax."""
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification" or logits.shape[-1] == 1:
        return sigmoid(logits)
    return softmax(logits)


def top_labels(scores: NDArray[np.float32], labels: Sequence[str], top_k: int | None) -> list[Classification]:
    """The ``top_k`` best labels of one row of scores [C], best first."""
    order = np.argsort(-scores, kind="stable")[:top_k].tolist()
    return [Classification(labels[i], float(scores[i])) for i in order]


def find_entities(
    text: str,
    scores: NDArray[np.float32],
    labels: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    words: Sequence[int | None],
    aggregation: str,
) -> list[Entity]:
    """The labelled stretches of one text, in order; ``O`` is left out.

    Args:
        text: The text.
        scores: Probabilities [S, C].
        labels: C names.
        offsets: Character range of each of the S tokens.
        words: Word of each token; None: a special token, skipped.
        aggregation: ``none``: one entity per token. ``simple``: neighbours of one label are joined, ``B-`` starts
            anew. ``first``: as simple, but every token of a word takes the word's first token's label and score.
    """
    best = scores.argmax(axis=-1).tolist()
    tokens: list[Entity] = []
    previous: int | None = None
    for i, (word, (start, end)) in enumerate(zip(words, offsets, strict=True)):
        if word is None:
            continue
        if aggregation == "first" and tokens and word == previous:
            first = tokens[-1]
            tokens[-1] = Entity(first.label, first.score, first.start, end, text[first.start : end])
        else:
            tokens.append(Entity(labels[best[i]], float(scores[i, best[i]]), start, end, text[start:end]))
        previous = word
    found = tokens if aggregation == "none" else _group(text, tokens)
    return [entity for entity in found if entity.label != "O"]


def _split_tag(label: str) -> tuple[bool, str]:
    """Whether the label begins an entity, and its name without the prefix."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label


def _group(text: str, tokens: Sequence[Entity]) -> list[Entity]:
    groups: list[list[Entity]] = []
    for token in tokens:
        begins, name = _split_tag(token.label)
        if groups and not begins and _split_tag(groups[-1][-1].label)[1] == name:
            groups[-1].append(token)
        else:
            groups.append([token])
    joined = []
    for group in groups:
        start, end = group[0].start, group[-1].end
        score = float(np.mean([token.score for token in group]))
        joined.append(Entity(_split_tag(group[0].label)[1], score, start, end, text[start:end]))
    return joined


def best_spans(
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
    answerable: NDArray[np.bool_],
    max_tokens: int,
    top_k: int,
) -> list[tuple[float, int, int]]:
    """The best spans of one window.

    The probabilities are taken over the answerable tokens and the first one (where models put
    "no answer"), which itself is never part of a span.

    Args:
        start_logits: float32 [S].
        end_logits: float32 [S].
        answerable: Which tokens belong to the context, [S].
        max_tokens: Longest span.
        top_k: How many spans.

    Returns:
        (score, first token, last token), best first; fewer than ``top_k`` when there are no more.
    """
    seen = answerable.copy()
    seen[0] = True
    start, end = (softmax(np.where(seen, logits, -np.inf)) for logits in (start_logits, end_logits))
    products = np.where(answerable, start, 0)[:, None] * np.where(answerable, end, 0)[None, :]
    products = np.tril(np.triu(products), max_tokens - 1)
    flat = products.ravel()
    count = min(top_k, int(np.count_nonzero(flat)))
    if not count:
        return []
    candidates = np.argpartition(-flat, count - 1)[:count]
    candidates = candidates[np.argsort(-flat[candidates], kind="stable")]
    width = len(start)
    return [(float(flat[i]), int(i) // width, int(i) % width) for i in candidates]


__all__ = [
    "AGGREGATIONS",
    "Answer",
    "Entity",
    "Fill",
    "activate",
    "best_spans",
    "find_entities",
    "label_scores",
    "read_labels",
    "sigmoid",
    "softmax",
    "top_labels",
]
