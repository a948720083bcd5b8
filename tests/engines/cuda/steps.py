"""Steps of a small decoder on the cuda engine, and generation through the slot loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.session import StepInputs
from accel.runtime.sampling import Sampler, SamplingParams
from accel.runtime.sequence import Sequence
from accel.runtime.slots import SlotLoop, SlotOptions

ROWS, CAPACITY = 3, 48
GREEDY = SamplingParams()
HOT = SamplingParams(do_sample=True, temperature=1.5, seed=1)
MIXED = SamplingParams(do_sample=True, temperature=0.9, top_k=40, top_p=0.95, min_p=0.001, seed=2)
Case = tuple[SamplingParams, dict[str, Any]]
# Drawn and greedy rows, and such as go the host's way for a while or always, which takes all rows of a step there.
CASES: list[Case] = [
    (HOT, {}),
    (MIXED, {"min_new_tokens": 2, "eos_token_ids": frozenset({1})}),
    (GREEDY, {}),
    (HOT, {}),
    (SamplingParams(do_sample=True, repetition_penalty=1.3, seed=4), {}),
    (MIXED, {"logprobs": 1}),
    (MIXED, {}),
]


def inputs(tokens: dict[int, list[int]], past: dict[int, int], wanted: list[int] | None = None) -> StepInputs:
    """A step of these rows' tokens; by default each row's last token's logits are wanted."""
    lengths, pasts = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
    for row, ids in tokens.items():
        lengths[row], pasts[row] = len(ids), past.get(row, 0)
    ids = [token for row in sorted(tokens) for token in tokens[row]]
    positions = [past.get(row, 0) + place for row in sorted(tokens) for place in range(len(tokens[row]))]
    ends = np.cumsum([len(tokens[row]) for row in sorted(tokens)]) - 1
    return StepInputs(np.array(ids), np.array(positions), lengths, pasts, np.array(ends if wanted is None else wanted))


def count_runs(session: CudaDecoderSession, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one per run of the program."""
    runs: list[int] = []
    run = session._executor.run
    monkeypatch.setattr(session._executor, "run", lambda *args: (runs.append(1), run(*args))[1])
    return runs


class WithoutSampling:
    """The session as an engine that leaves drawing to the host."""

    def __init__(self, session: Any) -> None:
        self.step, self.copy_row, self.greedy = session.step, session.copy_row, session.greedy
        self.max_batch, self.capacity, self.vocab_size = session.max_batch, session.capacity, session.vocab_size
        self.mixed_steps = session.mixed_steps


def generate(engine: Any, cases: list[Case], late: int = 0, least: int = 3) -> list[list[int]]:
    """Tokens of sequences that join and leave; the last ``late`` ones join after some steps."""
    loop, made = SlotLoop(engine, SlotOptions(chunk=6)), []
    for place, (params, options) in enumerate(cases):
        prompt = np.arange(3, 8 + place) + 7 * place
        count = least + 2 * (place % 3)
        made.append(Sequence(prompt, Sampler(params, engine.vocab_size, stream=place), count, **options))
    for sequence in made[: len(made) - late]:
        loop.submit(sequence)
    for _ in range(3):
        loop.step()
    for sequence in made[len(made) - late :]:
        loop.submit(sequence)
    while loop.has_work:
        loop.step()
    assert all(sequence.error is None for sequence in made)
    return [sequence.new_ids for sequence in made]
