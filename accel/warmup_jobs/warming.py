"""Warms up an engine that compiles where it runs: what its first requests would wait for is done and kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from accel.bench import SHAPES
from accel.bench.models import encoder_inputs
from accel.bench.models import prompt as bench_prompt
from accel.bundle import Bundle
from accel.runtime.load import load
from accel.warmup_jobs.jobs import Wanted
from accel.warmup_jobs.measuring import decoder_sizes

ROUNDS = 3
TOKENS = 128  # of each row of an encoder's largest batch
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0}


def warm_engine(wanted: Wanted, variant: str, store: str | None) -> dict[str, float]:
    """Loads a bundle on one engine and sends it what is served: kernels are compiled, and those of ``cuda`` compared.

    What is kept for the next process: kernels in Triton's cache, and in the store which of them are fastest.

    Args:
        wanted: The engine; of a decoder each power of two up to ``max_batch`` runs, greedy and drawn.
        variant: That it runs.
        store: As in ``accel.load``.

    Returns:
        Median milliseconds of what ran, by name.

    Raises:
        EngineUnavailableError: It cannot run the bundle here; says why.
        CapacityError: The cache that is wanted does not fit.
        EngineError: It failed.
    """
    bundle = Bundle.open(wanted.bundle)
    decodes = bundle.manifest.arch.kind == "decoder"
    sizes: dict[str, Any] = {"capacity": wanted.capacity, "max_batch": wanted.max_batch} if decodes else {}
    with load(bundle.path, "cuda", wanted.target, variant, strict=True, store=store, **sizes) as model:
        if decodes:
            return _warm_decoder(model, bundle)
        return _warm_encoder(model, bundle, variant, wanted)


def _warm_decoder(model: Any, bundle: Bundle) -> dict[str, float]:
    prompt, new = decoder_sizes(model.capacity)
    vocabulary, found = bundle.manifest.arch.vocab_size, {}
    for rows in _batches(model.max_batch):
        ids = bench_prompt(rows * prompt, vocabulary).reshape(rows, prompt)
        options = {"max_new_tokens": new + 1, "eos_token_id": []}
        model.generate(ids, **options, **DRAWN)
        for _ in range(2):  # the first prompt of a size runs plainly, the second is recorded, the next ones replay that
            model.generate(ids, **options)
        timings = [model.generate(ids, **options)[0].timings for _ in range(ROUNDS)]
        found[f"prompt {rows}x{prompt}"] = _median(each.first_token for each in timings)
        found[f"token, batch {rows}"] = _median((each.total - each.first_token) / new for each in timings)
    return found


def _warm_encoder(model: Any, bundle: Bundle, variant: str, wanted: Wanted) -> dict[str, float]:
    arch, names = bundle.manifest.arch, {spec.name for spec in bundle.graph(variant, wanted.target).inputs}
    largest = [(wanted.max_batch, TOKENS)] if wanted.max_batch else []
    shapes = dict.fromkeys((rows, min(tokens, arch.max_positions)) for rows, tokens in (*SHAPES, *largest))
    found = {}
    for rows, tokens in shapes:
        inputs = encoder_inputs(rows, tokens, arch.vocab_size)
        feeds = {name: inputs[name] for name in inputs if name in names}
        call = lambda feeds=feeds: model(**feeds)  # noqa: E731
        call()
        call()
        found[f"forward {rows}x{tokens}"] = _median(_seconds(call) for _ in range(ROUNDS))
        if rows > 1 and "attention_mask" in feeds:  # rows of different lengths take other sizes
            lengths = np.linspace(max(1, tokens // 4), tokens, rows).astype(int)
            model(**feeds | {"attention_mask": (np.arange(tokens) < lengths[:, None]).astype(np.int64)})
    return found


def _batches(most: int) -> Iterator[int]:
    """Powers of two, and the most: engines round a step's rows up to the next one."""
    rows = 1
    while rows < most:
        yield rows
        rows *= 2
    yield most


def _median(seconds: Iterator[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


__all__ = ["warm_engine"]
