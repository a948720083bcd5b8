"""Tokens drawn where ONNX Runtime left the logits, by the ``cuda`` engine's kernels: no operator of its own does that.

Where the kernels do not run, the host draws from logits that it copies.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from accel.engines.cuda.registry import unfit_gpu
from accel.engines.session import Draws
from accel.errors import EngineUnavailableError

if TYPE_CHECKING:
    from accel.engines.cuda.drawing import Drawer


def open_drawer(address: int, rows: int, vocab_size: int, index: int) -> Drawer:
    """What draws from logits on a GPU.

    Args:
        address: Of float32 [rows, vocab_size] on it.
        rows: Most that are drawn at once.
        vocab_size: Logits of each.
        index: The GPU's number.

    Raises:
        EngineUnavailableError: The kernels do not run here.
        EngineError: The GPU's memory is full.
        EngineBrokenError: The GPU failed.
    """
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    try:
        why = f"{' and '.join(missing)} missing" if missing else unfit_gpu()
        if why is not None:
            raise EngineUnavailableError(why)
        from accel.engines.cuda.drawing import MAX_VOCAB, gpu_drawer
    except (ImportError, OSError) as error:  # a package that is there and broken
        raise EngineUnavailableError(f"{type(error).__name__}: {error}") from error
    if vocab_size > MAX_VOCAB:
        raise EngineUnavailableError(f"the vocabulary has {vocab_size:,} tokens, the kernels take {MAX_VOCAB:,}")
    return gpu_drawer(address, rows, vocab_size, index)


def table_of(draws: Draws, wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """How a run's tokens are drawn.

    Args:
        draws: Of a step's wanted positions.
        wanted: int64 [R], which of them each row of the run's logits is; -1: none, its best token is taken.

    Returns:
        float64 [R, 5]: temperature, top_k, top_p, min_p, uniform.
    """
    table = np.zeros((len(wanted), 5))
    taken = wanted >= 0
    table[taken, :4], table[taken, 4] = draws.filters[wanted[taken]], draws.uniforms[wanted[taken], 0]
    return table


__all__ = ["open_drawer", "table_of"]
