"""The cache that a traced decoder sees: it stores nothing, the attention node owns the real one."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache


class PassThroughCache(Cache):
    """Hands the step's own keys and values straight on to the attention function."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return 1, 0
