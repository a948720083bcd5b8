"""What the graphs of target ``ort-cuda`` take, made from what sessions are given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel.engines.padded import PaddedStep

Feeds = dict[str, NDArray]


def step_feeds(step: PaddedStep) -> Feeds:
    """A decoder run's inputs but its caches.

    Padding counts as tokens of its row: it stands behind them, so that they do not see it, and what it leaves in the
    cache is overwritten by the tokens that come next.
    """
    rows, width = step.input_ids.shape
    lengths = step.write_index + width
    return {
        "input_ids": step.input_ids.reshape(-1),
        "position_ids": step.position_ids.reshape(-1),
        "step_shape": np.array([rows, width, -1], np.int64),
        "seqlens_k": (lengths - 1).astype(np.int32),
        "total_length": np.array(lengths.max(), np.int32),
        "logits_positions": step.logits_positions,
    }


def mask_feeds(mask: NDArray[np.int64]) -> Feeds:
    """An encoder's mask [B, S] as its kernel wants it: keys per row where no row has holes, else the mask itself.

    A row without any token counts as one: what it gives is nobody's business, but it must be a number.
    """
    lengths = np.count_nonzero(mask, axis=1)
    if ((mask != 0) == (np.arange(mask.shape[1]) < lengths[:, None])).all():
        return {
            "key_mask": np.maximum(lengths, 1).astype(np.int32),
            "key_mask_shape": np.array([len(mask)], np.int64),
        }
    return {
        "key_mask": (mask != 0).astype(np.int32).reshape(-1),
        "key_mask_shape": np.array(mask.shape, np.int64),
    }


__all__ = ["Feeds", "mask_feeds", "step_feeds"]
