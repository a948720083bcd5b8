"""Measures a bundle and eager PyTorch against the same model in double precision."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import DecoderSession, SessionOptions, StepInputs
from accel.exporter.tracer import takes_token_types
from tests.parity.families import PAD, VOCAB

# One rounding of a value as large as the largest output. Where eager happens to lose less than that (a model of
# few operations), twice its error would ask for more than fp32 holds.
FLOOR = 2.0**-24
FACTOR = 2.0

Rows = list[NDArray[np.int64]]
Steps = list[tuple[int, ...]]

# What a decoder is asked: tokens that each row brings, per step. Rows of 40, 29 and 17 tokens.
LENGTHS = (40, 29, 17)
COURSES: dict[str, Steps] = {
    "prefill": [(40, 0, 0)],
    "chunked prefill": [(7, 0, 0), (16, 0, 0), (1, 0, 0), (16, 0, 0)],
    "decode": [(5, 0, 0), *[(1, 0, 0)] * 35],
    "ragged batch": [(40, 29, 17)],
    "rows that join, wait and go": [(9, 0, 4), (1, 12, 3), (1, 1, 0), (20, 1, 1), (0, 15, 9), (9, 0, 0)],
}


class _Double(TorchFunctionMode):
    """transformers computes norms, softmax and angles in fp32 whatever the model's dtype; here they are fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        swap = {torch.float32: torch.float64}
        args = tuple(swap.get(arg, arg) if isinstance(arg, torch.dtype) else arg for arg in args)
        kwargs = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def double_precision(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A copy of the model that computes in fp64 throughout, from the same fp32 parameters and buffers."""
    with torch.no_grad(), _Double():
        yield copy.deepcopy(model).double()


@dataclass(frozen=True)
class Deviation:
    """How far float32 results lie from the fp64 ones, over one set of values.

    Attributes:
        largest: Largest absolute error.
        rms: Root of the mean squared error: a systematic loss shows here before it does in the largest.
        scale: Largest absolute value of the reference.
    """

    largest: float
    rms: float
    scale: float


def deviation(found: NDArray, exact: NDArray) -> Deviation:
    """Compares results of the same values."""
    assert found.dtype == np.float32 and exact.dtype == np.float64
    assert found.shape == exact.shape and np.isfinite(found).all()
    difference = np.abs(found - exact)
    return Deviation(float(difference.max()), float(np.sqrt(np.mean(difference**2))), float(np.abs(exact).max()))


def widest(*deviations: Deviation) -> Deviation:
    """The larger of each figure: what eager loses on these values, and what it loses on many more of the model."""
    return Deviation(*(max(figures) for figures in zip(*(dataclasses.astuple(part) for part in deviations))))


def excess(found: Deviation, eager: Deviation) -> float:
    """Error over the limit of twice eager's own, the worse of largest and rms; above 1 the comparison fails.

    ``eager`` should cover more than the values in question (``widest``): the largest of a hundred roundings is
    luck, of some thousands it says how much this model amplifies them.
    """
    floor = FLOOR * eager.scale
    return max(
        found.largest / (FACTOR * max(eager.largest, floor)),
        found.rms / (FACTOR * max(eager.rms, floor / 4)),
    )


def draw_rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 5) -> Rows:
    """Random ids without the padding id."""
    rng = np.random.default_rng(seed)
    return [rng.integers(PAD + 1, VOCAB, length) for length in lengths]


def decoder_logits(model: PreTrainedModel, rows: Rows) -> list[NDArray]:
    """[n, V] per row, one pass without a cache each."""
    with torch.no_grad():
        return [model(input_ids=torch.from_numpy(row)[None], use_cache=False).logits[0].numpy() for row in rows]


def decoder_references(model: PreTrainedModel, rows: Rows) -> tuple[list[NDArray], list[NDArray]]:
    """(eager fp32, fp64) logits per row."""
    with double_precision(model) as exact:
        doubled = decoder_logits(exact, rows)
    return decoder_logits(model, rows), doubled


def decoder_yardstick(model: PreTrainedModel, rows: Rows) -> tuple[Deviation, list[NDArray]]:
    """Eager's own deviation, over these rows, each of them, and five more; the rows' fp64 logits."""
    eager, exact = decoder_references(model, [*rows, *draw_rows((40,) * 5, seed=6)])
    everywhere = deviation(np.concatenate(eager), np.concatenate(exact))
    each = [deviation(*pair) for pair in zip(eager[: len(rows)], exact)]
    return widest(everywhere, *each), exact[: len(rows)]


def open_decoder(bundle: Path, capacity: int = 128) -> DecoderSession:
    """The bundle's session on ONNX Runtime, with three rows."""
    options = SessionOptions(threads=1, capacity=capacity, max_batch=3)
    opened = open_session(Bundle.open(bundle), engine="ort-cpu", options=options)
    assert opened.session.info.name == "ort-cpu"
    return opened.session  # type: ignore[return-value]


def step_inputs(rows: Rows, past: NDArray[np.int32], step: tuple[int, ...]) -> StepInputs:
    """One step's inputs, asking for every token's logits."""
    spans = [(int(start), int(start + count)) for start, count in zip(past, step)]
    return StepInputs(
        input_ids=np.concatenate([row[start:stop] for row, (start, stop) in zip(rows, spans)]),
        position_ids=np.concatenate([np.arange(start, stop) for start, stop in spans]),
        query_lengths=np.array(step, np.int32),
        past_lengths=past.copy(),
        logits_positions=np.arange(sum(step)),
    )


def run_course(session: DecoderSession, rows: Rows, steps: Steps) -> list[NDArray[np.float32]]:
    """[n, V] per row that took part, put together from the steps."""
    past = np.zeros(len(rows), np.int32)
    found: list[list[NDArray]] = [[] for _ in rows]
    for step in steps:
        logits = session.step(step_inputs(rows, past, step)).copy()
        for parts, part in zip(found, np.split(logits, np.cumsum(step)[:-1])):
            parts.append(part)
        past += np.array(step, np.int32)
    return [np.concatenate(parts) for parts in found]


def select(found: list[NDArray], full: list[NDArray]) -> NDArray:
    """The reference's values for the tokens that a course has run, rows one after another."""
    return np.concatenate([reference[: len(part)] for reference, part in zip(full, found)])


def encoder_batches(model: PreTrainedModel) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Batches with and without padding; token types where the model has them."""
    token_types = takes_token_types(model)
    pad = model.config.pad_token_id
    made = {}
    shapes = {
        "full": (30,) * 8,
        "padded": (40, 5, 13, 39, 30, 1, 22, 17),
        "one row": (30,),
        "one token": (1,),
        "short and long": (2, 40),
    }
    for seed, (name, lengths) in enumerate(shapes.items()):
        rng = np.random.default_rng(seed)
        real = np.arange(max(lengths)) < np.array(lengths)[:, None]
        feeds = {
            "input_ids": np.where(real, rng.integers(pad + 1, VOCAB, real.shape), pad),
            "attention_mask": real.astype(np.int64),
        }
        if token_types:
            feeds["token_type_ids"] = np.where(real, rng.integers(0, 2, real.shape), 0)
        made[name] = feeds
    return made


def encoder_outputs(model: PreTrainedModel, feeds: dict[str, NDArray], names: list[str]) -> dict[str, NDArray]:
    """The model's outputs by name."""
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    return {name: getattr(output, name).numpy() for name in names}


def encoder_references(
    model: PreTrainedModel, feeds: dict[str, NDArray], names: list[str]
) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """(eager fp32, fp64) outputs."""
    with double_precision(model) as exact:
        doubled = encoder_outputs(exact, feeds, names)
    return encoder_outputs(model, feeds, names), doubled


def flatten_real(outputs: dict[str, NDArray], feeds: dict[str, NDArray]) -> NDArray:
    """All values of all outputs, without those of padding: what padding gives is nobody's business."""
    real = feeds["attention_mask"] == 1
    parts = [part[real] if part.shape[:2] == real.shape else part for part in outputs.values()]
    return np.concatenate([part.reshape(-1) for part in parts])
