"""The one protocol every engine implements, and the records that cross it. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EngineInfo:
    """What runs: engine name (``ort-cpu``, ``openvino``, ``torch``, ...), version, device, variant, threads.

    ``why`` says what was measured, where that decided: ``measured: 8.1 ms against 9.9 ms of ort-cpu``.
    """

    name: str
    version: str
    device: str
    variant: str
    threads: int
    why: str = ""


@dataclass(frozen=True)
class Fallback:
    """One engine that was passed over, and why.

    ``engine`` is its name, ``cuda`` for all that need a GPU, or ``engine variant`` where only that variant was.
    """

    engine: str
    reason: str


@dataclass(frozen=True)
class SessionOptions:
    """How to open a session.

    Attributes:
        threads: Worker threads; None: all cores this process may use.
        capacity: Cache positions per row (decoders); None: chosen from the memory at hand.
        max_batch: Cache rows (decoders); None: the default of the runtime.
        store: Where built engines are kept (TensorRT): a directory or URL; None: the default of this machine.
    """

    threads: int | None = None
    capacity: int | None = None
    max_batch: int | None = None
    store: str | None = None


class StepInputs(NamedTuple):
    """One packed (padding-free) step over the cache's rows.

    The tokens of all rows stand one after another, in row order; row b brings
    ``query_lengths[b]`` new tokens (0: the row sits this step out) and has
    ``past_lengths[b]`` tokens in its cache already.

    Attributes:
        input_ids: int64 [T], T = query_lengths.sum().
        position_ids: int64 [T], each token's position in its own sequence.
        query_lengths: int32 [B], B = the session's max_batch.
        past_lengths: int32 [B].
        logits_positions: int64 [R], indices into the T tokens whose logits are wanted.
        rows: One more than the last row that brings tokens; None: read it off query_lengths.
        width: The largest of query_lengths; None: read it off them.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    query_lengths: NDArray[np.int32]
    past_lengths: NDArray[np.int32]
    logits_positions: NDArray[np.int64]
    rows: int | None = None
    width: int | None = None


class ChosenTokens(NamedTuple):
    """The token that was chosen at each wanted position, and its logit, which tells NaN and infinity."""

    tokens: NDArray[np.int64]  # [R]; of the best ones the lowest index
    logits: NDArray[np.float32]  # [R]


@dataclass(frozen=True)
class Draws:
    """How the token of each wanted position is drawn.

    A row whose temperature is 0 is not drawn: its best token is taken.

    Attributes:
        filters: float64 [R, 4]: temperature, top_k (0: all), top_p, min_p, which act in this order as
            ``SamplingParams`` says.
        uniforms: float64 [R, 2], numbers of [0, 1): that of this step, and that of the step behind it.
    """

    filters: NDArray[np.float64]
    uniforms: NDArray[np.float64]


class EncoderSession(Protocol):
    """Runs an encoder graph. Thread-safe."""

    info: EngineInfo

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        """Runs ``input_ids``/``attention_mask``/``token_type_ids`` int64 [B, S]; returns the outputs by name.

        Without a mask all tokens are real; without token types all are 0.
        """
        ...

    def close(self) -> None: ...


class DecoderSession(Protocol):
    """Runs a decoder graph over a cache that it owns. One thread at a time: the slot loop serialises.

    The cache is preallocated, ``[max_batch, kv_heads, capacity, head_dim]`` per layer for
    keys and for values, and updated in place: its addresses never change.
    """

    info: EngineInfo
    max_batch: int
    capacity: int
    vocab_size: int
    mixed_steps: bool  # rows with several new tokens on a non-empty past may share a step with others

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Appends the step's keys and values to the cache; returns logits float32 [R, vocab_size].

        The returned array may be reused by the next step: copy what must outlive it.
        """
        ...

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` cache positions of one row over another row's."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class GreedySession(Protocol):
    """A decoder session that can keep the logits to itself."""

    def greedy(self, inputs: StepInputs) -> ChosenTokens:
        """As ``DecoderSession.step``, but returns the best token of each wanted position."""
        ...


@runtime_checkable
class SamplingSession(Protocol):
    """A decoder session that can draw tokens itself."""

    def sample(self, inputs: StepInputs, draws: Draws) -> ChosenTokens:
        """As ``DecoderSession.step``, but returns a token of each wanted position, drawn as ``draws`` says.

        It is the token on whose share of what the filters leave, in the order of ids, the uniform number falls; where
        the best logit is NaN or infinite the best one, whose logit tells.
        """
        ...
