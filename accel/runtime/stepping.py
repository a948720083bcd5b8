"""A planned step on its way through the engine: its packed inputs, and which of the engine's ways it takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel.engines.session import (
    ChosenTokens,
    DecoderSession,
    Draws,
    GreedySession,
    SamplingSession,
    StepInputs,
)
from accel.runtime.sequence import Sequence

Plan = list[tuple[Sequence, int]]  # who takes part, with how many tokens, in row order


class Stepper:
    """Runs plans on one session.

    Args:
        session: The engine's.
    """

    def __init__(self, session: DecoderSession) -> None:
        self._session = session
        self._greedy = session.greedy if isinstance(session, GreedySession) else None
        self._sample = session.sample if isinstance(session, SamplingSession) else None
        self._query = np.zeros(session.max_batch, np.int32)
        self._past = np.zeros(session.max_batch, np.int32)
        self._position = np.zeros(1, np.int64)
        self._alone: int | None = None  # the row that the last step's arrays hold alone, with one token

    def run(self, plan: Plan, inputs: StepInputs) -> NDArray[np.float32] | ChosenTokens:
        """The wanted logits, or the tokens alone where nobody looks at the rest and the engine can choose them."""
        greedy, sample = self._greedy, self._sample
        for sequence, _ in plan:  # a loop: in every step a generator costs more than the answer
            if not sequence.takes_best:
                greedy = None
                sample = sample if sequence.is_drawn else None
        if greedy is not None:
            return greedy(inputs)
        if sample is not None and len(inputs.logits_positions):
            return sample(inputs, draws_of(plan))
        return self._session.step(inputs)

    def build(self, plan: Plan) -> StepInputs:
        """The plan's inputs. Their lengths are the next step's arrays too."""
        query, past = self._query, self._past
        if len(plan) == 1 and plan[0][1] == 1 and plan[0][0].sampler is not None:  # one sequence, one token
            return self._build_one(plan[0][0])
        self._alone = None
        query.fill(0)
        past.fill(0)
        ids, positions, chosen, start = [], [], [], 0
        for sequence, count in plan:
            computed = sequence.computed
            query[sequence.row], past[sequence.row] = count, computed
            ids.append(sequence.tokens[computed : computed + count])
            positions.append(np.arange(computed, computed + count))
            first, last = wanted(sequence, count)
            chosen.append(np.arange(start + first, start + last))
            start += count
        rows, width = (plan[-1][0].row or 0) + 1, max(count for _, count in plan)
        return StepInputs(
            np.concatenate(ids), np.concatenate(positions), query, past, np.concatenate(chosen), rows, width
        )

    def _build_one(self, sequence: Sequence) -> StepInputs:
        """The usual step, with as few NumPy calls as can be: the arrays of the last one differ in two numbers."""
        query, past, computed, row = self._query, self._past, sequence.computed, sequence.row
        assert row is not None
        if self._alone != row:
            query.fill(0)
            past.fill(0)
            query[row], self._alone = 1, row
        past[row] = self._position[0] = computed
        chosen = _FIRST if sequence.remaining == 1 else _NONE
        return StepInputs(sequence.tokens[computed : computed + 1], self._position, query, past, chosen, row + 1, 1)


def wanted(sequence: Sequence, count: int) -> tuple[int, int]:
    """Which of its ``count`` tokens' logits a sequence needs: [first, last)."""
    if sequence.sampler is None:  # the last prompt token predicts nothing that is scored
        return 0, count - (sequence.remaining == count)
    return (count - 1, count) if sequence.remaining == count else (0, 0)


def draws_of(plan: Plan) -> Draws:
    """How each of the plan's wanted tokens is chosen. No random state moves: the step may fail, and be tried again."""
    rows = [sequence.sampler.peek() for sequence, count in plan if sequence.sampler and sequence.remaining == count]
    table = np.array(rows, np.float64)
    return Draws(table[:, :4], table[:, 4:])


_FIRST, _NONE = np.zeros(1, np.int64), np.zeros(0, np.int64)

__all__ = ["Plan", "Stepper", "draws_of", "wanted"]
