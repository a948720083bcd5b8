"""What a kernel may use here: Triton's interpreter, or a GPU and which of its features."""

from __future__ import annotations

import os
from functools import cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks when a kernel is defined


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before its predecessor ends (programmatic dependent launch, SM 90 and later).

    Triton's interpreter has no such thing.
    """
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


__all__ = ["INTERPRETED", "has_dependent_launch", "next_power_of_2"]
