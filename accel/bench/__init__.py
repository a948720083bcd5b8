"""Measuring: one bundle on this machine (``bench``), and accel against its peers (``scripts/benchmark.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accel.bench.bundle import BenchReport

SHAPES = ((1, 8), (1, 128), (8, 128), (1, 512))


def bench(
    bundle: str | Path,
    *,
    rounds: int = 7,
    threads: int | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    compare: bool = True,
    limits: bool = False,
) -> BenchReport:
    """Measures a bundle on this machine, in interleaved rounds with eager PyTorch where that is installed.

    Args:
        bundle: The bundle's directory.
        rounds: Interleaved rounds.
        threads: Threads of each side; None: all cores this process may use.
        shapes: Encoders: (batch, sequence) of the forwards; those longer than the model's positions are left out.
        prompt_tokens, new_tokens: Decoders: prompt length, and tokens decoded after the first.
        compare: Measure eager PyTorch too, where torch and transformers are installed.
        limits: Also measure this machine's streaming read and fp32 matrix product, and say how near the bundle comes.

    Returns:
        The figures; ``str()`` gives a table, ``.to_json()`` plain data.

    Raises:
        BundleError: The bundle cannot be opened.
        EngineError: The bundle could not be run.
        InputError: No shape fits the model, or an argument is out of range.
    """
    from accel.bench.bundle import bench_bundle

    return bench_bundle(Path(bundle), rounds, threads, shapes, prompt_tokens, new_tokens, compare, limits)


__all__ = ["SHAPES", "bench"]
