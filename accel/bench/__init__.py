"""Measuring: one bundle on this machine (``bench``), and accel against its peers (``scripts/benchmark.py``)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from accel.bench.bundle import BenchReport

SHAPES = ((1, 8), (1, 128), (8, 128), (1, 512))
BATCH = 8  # sequences at a time, as accel.load has rows for


def bench(
    bundle: str | Path,
    *,
    rounds: int = 7,
    threads: int | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    compare: bool = True,
    limits: bool | None = None,
    batch: int = BATCH,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    store: str | Path | None = None,
    show_progress: bool | None = None,
) -> BenchReport:
    """Measures a bundle on this machine, in interleaved rounds with eager PyTorch where that is installed.

    Every engine takes part on every variant that it can run here. With 3 rounds or more the result is remembered, for
    this bundle, machine, versions of the libraries and number of threads: ``accel.load`` then takes the fastest engine.

    Args:
        bundle: The bundle's directory.
        rounds: Interleaved rounds.
        threads: Threads of each side; None: all cores this process may use.
        shapes: Encoders: (batch, sequence) of the forwards; those longer than the model's positions are left out.
        prompt_tokens, new_tokens: Decoders: prompt length, and tokens decoded after the first.
        compare: Measure eager PyTorch too, where torch and transformers are installed.
        device: Of the engines; ``auto``: the GPU where an engine runs on one, else the CPU.
        store: Where built engines, and what is measured, are kept; None: as in ``accel.load``.
        limits: Also measure what this machine allows, and say how near the bundle comes: on the CPU streaming read and
            fp32 matrix product, on a GPU copy bandwidth and matrix rate, for each phase and fused operator of ``cuda``.
            None: on a GPU alone, where ``cuda`` runs.
        batch: Decoders: sequences of a step that those phases are timed with too, beside one alone.
        show_progress: Print a line to stderr for each engine that is ready and each round, with the medians so far;
            None: when it is a terminal.

    Returns:
        The figures; ``str()`` gives a table, ``.to_json()`` plain data.

    Raises:
        BundleError: The bundle cannot be opened.
        EngineError: The bundle could not be run; ``EngineUnavailableError``: no engine can run it here.
        InputError: No shape fits the model, or an argument is out of range.
    """
    from accel.bench.bundle import bench_bundle

    place = None if store is None else str(store)
    say = _print if show_progress or (show_progress is None and sys.stderr.isatty()) else _ignore
    return bench_bundle(
        Path(bundle), rounds, threads, shapes, prompt_tokens, new_tokens, compare, limits, device, place, say, batch
    )


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _ignore(line: str) -> None:
    """Nobody looks."""


__all__ = ["BATCH", "SHAPES", "bench"]
