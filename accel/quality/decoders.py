"""What a decoder says of a text, and how two decoders' words differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import EngineInfo
from accel.errors import EngineError, InputError
from accel.manifest import GreedyAgreement, Likelihood, PhaseTimings
from accel.passages import CHARACTERS
from accel.quality.statistics import paired_difference
from accel.quality.text_set import TextSet
from accel.quality.timing import time_decoder
from accel.runtime.decoder import Decoder
from accel.runtime.results import TeacherForced

WINDOW = 512  # tokens of a block; longer passages are cut into several, shorter ones are a block each
PROMPTS, PROMPT_TOKENS = 8, 32  # continued greedily
TOGETHER = 2048  # tokens scored per call: enough to fill every step, few enough to show progress
Advance = Callable[[int], None]


@dataclass(frozen=True)
class DecoderPlan:
    """The same token ids for every variant.

    Attributes:
        blocks: int64 [n] each, n >= 2.
        prompts: int64 [n] each; beginnings of blocks.
        new_tokens: Generated after each prompt.
    """

    blocks: tuple[NDArray[np.int64], ...]
    prompts: tuple[NDArray[np.int64], ...]
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that are run."""
        return sum(map(len, self.blocks))


@dataclass(frozen=True)
class DecoderObservation:
    """What one variant did with a plan; ``forced`` per block, ``generated`` per prompt."""

    engine: EngineInfo
    forced: tuple[TeacherForced, ...]
    generated: tuple[tuple[int, ...], ...]
    timings: tuple[PhaseTimings, ...]


def make_plan(decoder: Decoder, text: TextSet, max_tokens: int, new_tokens: int) -> DecoderPlan:
    """Turns texts into blocks and prompts.

    Args:
        decoder: Any variant of the model.
        text: Passages are taken in order until there are ``max_tokens``.
        max_tokens: Most tokens to score.
        new_tokens: To generate after each of eight prompts.

    Raises:
        InputError: No passage has two tokens.
        BundleError: The bundle has no tokenizer.
    """
    tokenizer, positions = decoder.tokenizer, decoder.arch.max_positions
    width, blocks, left = min(WINDOW, positions), list[NDArray[np.int64]](), max_tokens
    for passage in text.passages:
        ids = np.array(tokenizer.encode(passage[: left * CHARACTERS]), np.int64)[:left]
        blocks += [ids[at : at + width] for at in range(0, len(ids), width) if len(ids) - at > 1]
        left -= len(ids)
        if left < 2:
            break
    if not blocks:
        remedy = "Give passages of at least two tokens"
        raise InputError("There is nothing to predict in the text", where=text.name, remedy=remedy)
    longest = sorted(range(len(blocks)), key=lambda index: -min(len(blocks[index]), 2 * PROMPT_TOKENS))  # stable
    prompts = [blocks[index][: min(PROMPT_TOKENS, max(1, len(blocks[index]) // 2))] for index in longest[:PROMPTS]]
    room = positions - max(map(len, prompts)) + 1
    return DecoderPlan(tuple(blocks), tuple(prompts), min(new_tokens, room))


def observe(decoder: Decoder, plan: DecoderPlan, advance: Advance) -> DecoderObservation:
    """Scores the plan's blocks, continues its prompts and takes the time of both kinds of call.

    Args:
        decoder: The model; its cache holds the longest block.
        plan: What to run.
        advance: Told of tokens as they are scored.

    Raises:
        CapacityError, EngineError: as ``Decoder.teacher_force``; also when another engine took over meanwhile.
    """
    engine, forced = decoder.engine, list[TeacherForced]()
    for some in _bundles(plan.blocks):
        result: Any = decoder.teacher_force(some)
        forced += result
        advance(sum(map(len, some)))
    greedy: Any = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": [], "num_return_sequences": 1}
    results: Any = decoder.generate(list(plan.prompts), max_new_tokens=plan.new_tokens, min_new_tokens=0, **greedy)
    timings = time_decoder(decoder, np.concatenate(plan.blocks)[:1024])
    if decoder.engine != engine:
        what = f"{engine.name} broke while it was measured, and {decoder.engine.name} took over"
        raise EngineError(what, where=f"variant {engine.variant}", remedy="Measure again with an engine that holds")
    return DecoderObservation(engine, tuple(forced), tuple(tuple(result.ids) for result in results), timings)


def compare(plan: DecoderPlan, observed: DecoderObservation, reference: DecoderObservation) -> dict[str, Any]:
    """``likelihood`` and ``greedy`` of a ``Quality``."""
    greedy = compare_greedy(plan, observed, reference)
    return {"likelihood": compare_likelihood(observed, reference), "greedy": greedy}


def compare_to_itself(plan: DecoderPlan, observed: DecoderObservation) -> dict[str, Any]:
    """The reference's own Q: there is no interval of what cannot differ."""
    return {"likelihood": replace(compare_likelihood(observed, observed), interval=None)}


def compare_likelihood(observed: DecoderObservation, reference: DecoderObservation) -> Likelihood:
    """Q of both, and the difference with its interval.

    Raises:
        EngineError: A token has probability zero.
    """
    ours, theirs = ([item.logprobs for item in side.forced] for side in (observed, reference))
    for side, scores in ((observed, ours), (reference, theirs)):
        if not all(np.isfinite(block).all() for block in scores):
            what = "A token of the text has probability 0"
            raise EngineError(what, where=f"variant {side.engine.variant}", remedy="The graph is wrong, or overflows")
    tokens = sum(map(len, ours))
    difference, interval = paired_difference([a - b for a, b in zip(ours, theirs, strict=True)])
    q, reference_q = (float(sum(block.sum() for block in side) / tokens) for side in (ours, theirs))
    return Likelihood(q, reference_q, difference, interval, tokens, len(ours))


def compare_greedy(plan: DecoderPlan, observed: DecoderObservation, reference: DecoderObservation) -> GreedyAgreement:
    """How often both take the same token: with the text before it, and each after its own."""
    pairs = zip(observed.forced, reference.forced, strict=True)
    same = np.concatenate([ours.best == theirs.best for ours, theirs in pairs])
    shares = [
        common_prefix(ours, theirs) / plan.new_tokens
        for ours, theirs in zip(observed.generated, reference.generated, strict=True)
    ]
    return GreedyAgreement(float(same.mean()), float(np.mean(shares)), len(shares), plan.new_tokens)


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens before the first that differs."""
    return next((index for index, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _bundles(blocks: tuple[NDArray[np.int64], ...]) -> list[list[NDArray[np.int64]]]:
    """Blocks in their order, together until they have enough tokens for a call."""
    found: list[list[NDArray[np.int64]]] = []
    size = TOGETHER
    for block in blocks:
        if size >= TOGETHER:
            found.append([])
            size = 0
        found[-1].append(block)
        size += len(block)
    return found


__all__ = ["DecoderObservation", "DecoderPlan", "compare", "compare_to_itself", "make_plan", "observe"]
