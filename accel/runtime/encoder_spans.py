"""The task heads that point into the text: entities, answers, masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import InputError
from accel.runtime import heads
from accel.runtime.batching import Row, Stopwatch
from accel.runtime.encoder_core import EncoderCore
from accel.runtime.encoder_inputs import check_count, check_one_text, check_texts
from accel.runtime.heads import Answer, Entity, Fill

if TYPE_CHECKING:
    from tokenizers import Encoding

QA_WINDOW = 384  # tokens per window of a long context, as question answering models are trained


class SpanTasks(EncoderCore):
    """Methods that need character offsets. Each raises EngineError after ``close()``."""

    def entities(
        self,
        texts: str | Sequence[str],
        aggregation: str = "simple",
        batch_size: int | None = None,
        truncate: bool = True,
        show_progress: bool | None = None,
    ) -> Any:
        """Labelled stretches of texts, with their character ranges.

        Args:
            texts: A text, or several.
            aggregation: ``none``: one per token. ``simple``: neighbouring tokens of one label are joined. ``first``: as
                simple, but each word takes its first token's label, so that no word is split.
            batch_size: Texts per micro-batch. None: by a token budget.
            truncate: Cut texts longer than ``max_length`` tokens, with a TruncationWarning; False: refuse them.
            show_progress: None: on long lists at a terminal.

        Returns:
            A list of Entity per text, in the text's order, without ``O``; one such list for a single str.

        Raises:
            InputError: No texts, an empty text, a bad option, another task.
        """
        watch = Stopwatch()
        self._require("token-classification", "entities", batch_size)
        if aggregation not in heads.AGGREGATIONS:
            remedy = f"Choose one of: {', '.join(heads.AGGREGATIONS)}"
            raise InputError(f"Unknown aggregation {aggregation!r}", where="aggregation", remedy=remedy)
        items, single, _ = check_texts(texts)
        strings = [str(item) for item in items]
        encodings = self._encode_spans(strings, truncate)
        found: list[list[Entity]] = [[] for _ in strings]
        labels: list[str] = []

        def consume(chosen: list[int], mask: NDArray | None, output: dict[str, NDArray]) -> None:
            scores = heads.softmax(output["logits"])
            labels[:] = labels or heads.read_labels(self.config, scores.shape[-1])
            for i, row in zip(chosen, scores, strict=True):
                encoding = encodings[i]
                own, words = row[: len(encoding.ids)], encoding.word_ids
                found[i] = heads.find_entities(strings[i], own, labels, encoding.offsets, words, aggregation)

        self._run_rows(_as_rows(encodings), consume, watch, batch_size, show_progress)
        self._finish(watch)
        return found[0] if single else found

    def answer(
        self, question: str, context: str, top_k: int = 1, max_answer_tokens: int = 15, stride: int = 128
    ) -> Any:
        """The stretch of the context that answers the question.

        A context that is too long for one window is read in overlapping ones, whole. Answers are
        widened to whole words.

        Args:
            question: The question.
            context: The text to search.
            top_k: How many different answers.
            max_answer_tokens: Longest answer.
            stride: Tokens that neighbouring windows share.

        Returns:
            An Answer; with ``top_k`` > 1 a list, best first, of at most so many. The score is the product of the
            probabilities of its two borders within its window.

        Raises:
            InputError: An empty text, a question too long for any context, a bad option, another task.
        """
        watch = Stopwatch()
        self._require("question-answering", "answer")
        for value, name in ((top_k, "top_k"), (max_answer_tokens, "max_answer_tokens"), (stride, "stride")):
            check_count(value, name, allow_none=False)
        check_one_text(question, "question")
        check_one_text(context, "context")
        windows = self._spans.windows(question, context, min(QA_WINDOW, self.max_length), stride)
        best: dict[tuple[int, int], float] = {}

        def consume(chosen: list[int], mask: NDArray | None, output: dict[str, NDArray]) -> None:
            for i, start, end in zip(chosen, output["start_logits"], output["end_logits"], strict=True):
                size = len(windows[i].ids)
                answerable = np.array([part == 1 for part in windows[i].sequence_ids])
                spans = heads.best_spans(start[:size], end[:size], answerable, max_answer_tokens, top_k)
                for score, first, last in spans:
                    place = _characters(windows[i], first, last)
                    best[place] = max(score, best.get(place, 0.0))

        self._run_rows(_as_rows(windows), consume, watch)
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        answers = [Answer(context[start:end], score, start, end) for (start, end), score in ranked]
        self._finish(watch)
        if not answers:
            raise InputError("The tokenizer makes no token of the context", where="context", remedy="Give another text")
        return answers[0] if top_k == 1 else answers

    def fill_mask(self, text: str, top_k: int = 5, truncate: bool = True) -> Any:
        """The most probable tokens for the masks of a text.

        Args:
            text: Holds the model's mask token at least once.
            top_k: Candidates per mask.
            truncate: Cut a text longer than ``max_length`` tokens, with a TruncationWarning; False: refuse it.

        Returns:
            A list of Fill, best first; with several masks one such list per mask, in order.

        Raises:
            InputError: An empty text, one without a mask (names the mask token), a bad option, another task.
        """
        watch = Stopwatch()
        self._require("fill-mask", "fill_mask")
        check_count(top_k, "top_k", allow_none=False)
        check_one_text(text, "text")
        if self._spans.mask_id is None:
            raise InputError("The model's tokenizer has no mask token", where="fill_mask", remedy="Call it with ids")
        encodings = self._encode_spans([text], truncate)
        ids = list(encodings[0].ids)
        places = [i for i, token in enumerate(ids) if token == self._spans.mask_id]
        if not places:
            remedy = f"Put {self._spans.mask_token} where a token is to be found"
            raise InputError("The text has no mask", where="text", remedy=remedy)
        fills: list[list[Fill]] = []

        def consume(chosen: list[int], mask: NDArray | None, output: dict[str, NDArray]) -> None:
            scores = heads.softmax(output["logits"][0, places])
            fills.extend(self._fills(ids, place, row, top_k) for place, row in zip(places, scores, strict=True))

        self._run_rows(_as_rows(encodings), consume, watch)
        self._finish(watch)
        return fills[0] if len(fills) == 1 else fills

    def _fills(self, ids: list[int], place: int, scores: NDArray[np.float32], top_k: int) -> list[Fill]:
        spans = self._spans
        found = []
        for token in np.argsort(-scores, kind="stable")[:top_k].tolist():
            filled = [*ids[:place], token, *ids[place + 1 :]]
            found.append(Fill(token, spans.token(token), float(scores[token]), spans.decode(filled)))
        return found

    def _encode_spans(self, texts: list[str], truncate: bool) -> list[Encoding]:
        """Encodings with offsets of checked texts; says what was cut, or refuses to cut."""
        encodings = self._spans.encode(texts, self.max_length)
        cut = [i for i, encoding in enumerate(encodings) if encoding.overflowing]
        if cut:
            longest = max(len(row[0]) for row in self.tokenizer.encode_batch([texts[i] for i in cut]))
            self._report_cut(cut, len(texts), self.max_length, longest, truncate)
        return encodings


def _as_rows(encodings: Sequence[Encoding]) -> list[Row]:
    return [(encoding.ids, encoding.type_ids, False) for encoding in encodings]


def _characters(window: Encoding, first: int, last: int) -> tuple[int, int]:
    """The character range of tokens ``first`` to ``last`` of the second sequence, widened to whole words."""
    start, end = window.offsets[first][0], window.offsets[last][1]
    for token in (first, last):
        word = window.word_ids[token]
        whole = None if word is None else window.word_to_chars(word, 1)
        if whole is not None:
            start, end = min(start, whole[0]), max(end, whole[1])
    return start, end


__all__ = ["QA_WINDOW", "SpanTasks"]
