"""The gate at export: the lowered graph in its engine against eager PyTorch, on seeded random ids.

Cases: encoders see a full batch, a ragged batch with padding, and a single row; decoders see a prompt followed by
one-token steps, ragged chunks of two rows, and a row that joins a running one. Where it is affordable, prompts are
longer than every attention window. Reference outputs are computed before the graph runs, so that the PyTorch model
can be dropped in between.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import DecoderSession, EncoderSession, StepInputs
from accel.errors import ParityError
from accel.manifest import ParityResult
from accel.recipe import ParityRecipe
from accel.spec import ArchSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("accel")
REFERENCE = "torch eager fp32"
ROWS = 2  # cache rows of the decoder cases
PROMPT = 24  # tokens, when no window asks for more
LONG_ROW = 400  # tokens of an unpadded encoder row: beyond the length where its attention changes kernels
MAX_PROMPT = 2048  # eager attention holds all scores of a prompt at once
MAX_FLOPS = 6e11  # of one reference pass: a few seconds on two cores
MAX_POSITIONS = 64  # compared per row: a vocabulary's logits are large


@dataclass
class EncoderCase:
    """One batch.

    Attributes:
        name: For the error.
        feeds: int64 [B, S] each, by input name.
        real: bool [B, S]; padding is not compared.
        expected: Outputs by name; filled by ``compute_references``.
    """

    name: str
    feeds: dict[str, NDArray[np.int64]]
    real: NDArray[np.bool_]
    expected: dict[str, NDArray[np.float32]]


@dataclass
class DecoderCase:
    """One course of steps over the cache's rows.

    Attributes:
        name: For the error.
        rows: Each row's ids, int64 [n].
        steps: Tokens that each row brings, per step.
        positions: Per row the positions whose logits are compared, int64 [m], ascending.
        expected: Per row float32 [m, V]; filled by ``compute_references``.
    """

    name: str
    rows: list[NDArray[np.int64]]
    steps: list[tuple[int, ...]]
    positions: list[NDArray[np.int64]]
    expected: list[NDArray[np.float32]]


Case = EncoderCase | DecoderCase


def make_cases(arch: ArchSpec, recipe: ParityRecipe, pad_id: int = 0, token_types: int = 0) -> list[Case]:
    """Draws the inputs.

    Args:
        arch: The model.
        recipe: Number of cases, seed, decode steps.
        pad_id: The id that stands in padding.
        token_types: Segment ids that the graph takes; 0: it takes none.
    """
    cases: list[Case] = []
    for index in range(recipe.cases):
        rng = np.random.default_rng((recipe.seed, index))
        if arch.kind == "decoder":
            cases.append(_decoder_case(arch, recipe, index, rng))
        else:
            cases.append(_encoder_case(arch, index, rng, pad_id, token_types))
    return cases


def compute_references(model: PreTrainedModel, arch: ArchSpec, cases: Sequence[Case]) -> None:
    """Fills in ``expected`` with eager attention; the model is left as it was."""
    import torch

    with torch.inference_mode(), _eager(model):
        for case in cases:
            if isinstance(case, EncoderCase):
                output = model(**{name: torch.from_numpy(array) for name, array in case.feeds.items()})
                case.expected = {name: getattr(output, name).numpy() for name in _outputs(arch)}
                continue
            for ids, positions in zip(case.rows, case.positions, strict=True):
                kept = torch.from_numpy(positions)
                output = model(input_ids=torch.from_numpy(ids)[None], use_cache=False, logits_to_keep=kept)
                case.expected.append(output.logits[0].numpy())


def references_from(session: Any, arch: ArchSpec, cases: Sequence[Case]) -> None:
    """Fills in ``expected`` with what a session gives that was checked itself: each decoder row in one run."""
    for case in cases:
        if isinstance(case, EncoderCase):
            outputs = session.run(case.feeds)
            case.expected = {name: np.array(outputs[name]) for name in _outputs(arch)}
            continue
        for ids, positions in zip(case.rows, case.positions, strict=True):
            lengths, past = (np.zeros(session.max_batch, np.int32) for _ in range(2))
            lengths[0] = len(ids)
            inputs = StepInputs(ids, np.arange(len(ids)), lengths, past, positions)
            case.expected.append(np.array(session.step(inputs)))


def check_parity(
    session: EncoderSession | DecoderSession, arch: ArchSpec, cases: Sequence[Case], recipe: ParityRecipe
) -> ParityResult:
    """Runs the cases and compares.

    The default limit of 1e-4 is far above what fp32 loses by summing in another order (some 1e-6 per pass,
    growing slowly with depth) and far below what a wrong scale, mask, window or activation does.

    Args:
        session: The engine under test; decoders with at least ``ROWS`` rows and ``capacity_of(cases)`` positions.
        arch: The model.
        cases: With references.
        recipe: The limit.

    Raises:
        ParityError: An error above the limit, a value that is not finite on either side, or another greedy token where
            the reference's margin exceeds the error; names case, value and limit.
    """
    gate = _Gate(recipe.limit)
    for case in cases:
        if isinstance(case, EncoderCase):
            _run_encoder(session, arch, case, gate)
        else:
            _run_decoder(session, case, gate, recipe.greedy_tokens > 0)
    greedy = arch.kind == "decoder" and recipe.greedy_tokens > 0
    return ParityResult(
        reference=REFERENCE,
        cases=len(cases),
        max_abs_error=gate.max_abs,
        max_rel_error=gate.max_rel,
        limit=recipe.limit,
        greedy_tokens_equal=gate.greedy_equal if greedy else None,
        greedy_tokens_total=gate.greedy_total if greedy else None,
        longest=max((_longest(case) for case in cases), default=None),
    )


def _longest(case: Case) -> int:
    return case.real.shape[1] if isinstance(case, EncoderCase) else max(len(row) for row in case.rows)


def capacity_of(cases: Sequence[Case]) -> int:
    """Cache positions that the decoder cases need."""
    return max((len(row) for case in cases if isinstance(case, DecoderCase) for row in case.rows), default=1)


class _Gate:
    """Collects errors and raises at the first above the limit."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.max_abs = self.max_rel = 0.0
        self.greedy_equal = self.greedy_total = 0

    def compare(self, where: str, found: NDArray, expected: NDArray) -> float:
        """Checks one output; returns its largest absolute error."""
        if found.shape != expected.shape:
            raise ParityError(f"The graph gives shape {found.shape}, PyTorch {expected.shape}", where=where)
        if not np.isfinite(expected).all():
            remedy = "There is nothing to compare with: look for damaged weights, or a config of another model"
            raise ParityError("PyTorch itself gives NaN or infinity", where=where, remedy=remedy)
        largest = float(np.abs(expected).max())
        error = float(np.abs(found - expected).max())
        relative = error / largest if largest > 0 else error
        if not relative <= self.limit:  # NaN too
            how = f"differs from PyTorch by {relative:.2e} of the largest value, more than the limit {self.limit:.1e}"
            if not (finite := bool(np.isfinite(found).all())):
                how = "gives NaN or infinity where PyTorch gives numbers"
            remedy = "Export without parity and see its passes with accel inspect; "
            remedy += "raise parity.limit only if you know why"
            wrong = ParityError(f"The exported graph {how}", where=where, remedy=remedy)
            wrong.value = relative if finite else float("inf")
            raise wrong
        self.max_abs, self.max_rel = max(self.max_abs, error), max(self.max_rel, relative)
        return error

    def compare_greedy(self, where: str, found: NDArray, expected: NDArray, error: float) -> None:
        """Greedy tokens must agree wherever the reference's two best are further apart than the error."""
        best = np.partition(expected, -2, axis=-1)[:, -2:]
        clear = best[:, 1] - best[:, 0] > error
        same = found.argmax(-1) == expected.argmax(-1)
        self.greedy_total += int(clear.sum())
        self.greedy_equal += int((clear & same).sum())
        if np.any(clear & ~same):
            index = int(np.flatnonzero(clear & ~same)[0])
            margin = float(best[index, 1] - best[index, 0])
            raise ParityError(
                f"The greedy token differs although its margin {margin:.2e} exceeds the error {error:.2e}", where=where
            )


def _run_encoder(session: Any, arch: ArchSpec, case: EncoderCase, gate: _Gate) -> None:
    outputs = session.run(case.feeds)
    for name, expected in case.expected.items():
        found = np.asarray(outputs[name])
        if arch.task != "text-classification" and found.shape == expected.shape:  # one value per token
            found, expected = found[case.real], expected[case.real]
        gate.compare(f"{case.name}, {name}", found, expected)


def _run_decoder(session: Any, case: DecoderCase, gate: _Gate, greedy: bool) -> None:
    past = np.zeros(session.max_batch, np.int32)
    for index, step in enumerate(case.steps):
        lengths = np.zeros(session.max_batch, np.int32)
        lengths[: len(step)] = step
        inputs, expected = _step_inputs(case, lengths, past)
        logits = np.array(session.step(inputs))
        past += lengths
        if len(expected):
            where = f"{case.name}, step {index}"
            error = gate.compare(where, logits, expected)
            if greedy:
                gate.compare_greedy(where, logits, expected, error)


def _step_inputs(
    case: DecoderCase, lengths: NDArray[np.int32], past: NDArray[np.int32]
) -> tuple[StepInputs, NDArray[np.float32]]:
    """One step, and the reference logits of the positions that it asks for."""
    ids, places, wanted, expected, start = [], [], [], [], 0
    for row, tokens in enumerate(case.rows):
        begin, end = int(past[row]), int(past[row] + lengths[row])
        ids.append(tokens[begin:end])
        places.append(np.arange(begin, end))
        inside = (case.positions[row] >= begin) & (case.positions[row] < end)
        wanted.append(case.positions[row][inside] - begin + start)
        expected.append(case.expected[row][inside])
        start += end - begin
    inputs = StepInputs(
        input_ids=np.concatenate(ids).astype(np.int64),
        position_ids=np.concatenate(places).astype(np.int64),
        query_lengths=lengths,
        past_lengths=past.copy(),
        logits_positions=np.concatenate(wanted).astype(np.int64),
    )
    return inputs, np.concatenate(expected)


def _prompt_length(arch: ArchSpec) -> int:
    """Longer than every window where that is affordable."""
    spans = [(layer.window or 0) * (1 if layer.causal else 2) for layer in arch.layers]
    wanted = max(PROMPT, max(spans, default=0) + 8)
    affordable = min(MAX_PROMPT, int(MAX_FLOPS / (2 * max(arch.parameters, 1))), arch.max_positions)
    if wanted > max(affordable, PROMPT):
        _log.warning("The parity check's prompts are shorter than the attention window of %d tokens", max(spans))
    return min(wanted if wanted <= affordable else PROMPT, arch.max_positions)


def _decoder_case(arch: ArchSpec, recipe: ParityRecipe, index: int, rng: np.random.Generator) -> DecoderCase:
    length = _prompt_length(arch)
    decode = max(recipe.greedy_tokens, 2)
    half = length // 2
    courses: tuple[tuple[str, list[tuple[int, ...]]], ...] = (
        ("a prompt and one-token steps", [(length,), *[(1,)] * decode]),
        ("ragged chunks of two rows", [(half, 3), (length - half, 1), (1, 4), (3, 0), (1, 1)]),
        ("a row that joins a running one", [(half, 0), (1, 5), (1, 1), (0, 2), (2, 1)]),
    )
    name, steps = courses[index % len(courses)]
    steps, totals = _fit(steps, arch.max_positions)
    rows = [rng.integers(0, arch.vocab_size, total) for total in totals]
    return DecoderCase(f"case {index} ({name})", rows, steps, [_choose(total) for total in totals], [])


def _fit(steps: Sequence[tuple[int, ...]], limit: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Shortens a course to ``limit`` positions per row; also returns each row's total."""
    totals, kept = [0] * len(steps[0]), []
    for step in steps:
        fitted = tuple(min(count, limit - total) for count, total in zip(step, totals, strict=True))
        if any(fitted):
            kept.append(fitted)
            totals = [total + count for total, count in zip(totals, fitted, strict=True)]
    return kept, totals


def _choose(total: int) -> NDArray[np.int64]:
    """All positions of a short row; of a long one the last and some spread over it."""
    if total <= MAX_POSITIONS:
        return np.arange(total)
    spread = np.linspace(0, total - 1, MAX_POSITIONS // 2).astype(np.int64)
    return np.union1d(spread, np.arange(total - MAX_POSITIONS // 2, total))


def _encoder_case(arch: ArchSpec, index: int, rng: np.random.Generator, pad_id: int, token_types: int) -> EncoderCase:
    length = _prompt_length(arch)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("a full batch", (length, length)),
        ("a ragged batch", (length, max(length // 3, 1), max(length - 1, 1))),
        ("one long row", (min(max(length, LONG_ROW), arch.max_positions),)),
    )
    name, lengths = shapes[index % len(shapes)]
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = rng.integers(0, arch.vocab_size, real.shape)
    ids[ids == pad_id] = (pad_id + 1) % arch.vocab_size  # some models count positions by what is no padding
    feeds = {"input_ids": np.where(real, ids, pad_id), "attention_mask": real.astype(np.int64)}
    if token_types:
        feeds["token_type_ids"] = np.where(real, rng.integers(0, token_types, real.shape), 0)
    return EncoderCase(f"case {index} ({name})", feeds, real, {})


def _outputs(arch: ArchSpec) -> tuple[str, ...]:
    named: Mapping[str, tuple[str, ...]] = {
        "feature-extraction": ("last_hidden_state",),
        "question-answering": ("start_logits", "end_logits"),
    }
    return named.get(arch.task, ("logits",))


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention and eval mode for the reference; a caller's model gets its own setting back."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


__all__ = ["Case", "DecoderCase", "EncoderCase", "capacity_of", "check_parity", "compute_references", "make_cases"]
