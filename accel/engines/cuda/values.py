"""Results that wait for their reader: what reads them decides whether one kernel does for two nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.engines.cuda.program import Matrix


@dataclass
class Normed:
    """norm(source), not computed yet. ``kind``: RMS_NORM or LAYER_NORM of accel_kernels."""

    source: torch.Tensor  # [T, K]
    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float
    kind: int
    shape: torch.Size | None = None  # of the result, where it is not [T, K]
    result: torch.Tensor | None = None


@dataclass
class Product:
    """source times matrix, not computed yet: its reader adds it to something."""

    source: object  # what the linear layer got
    matrix: Matrix


@dataclass
class Sum:
    """stream + added, the latter perhaps in parts [P, T, K]; the norm that reads it adds them up on the way."""

    stream: torch.Tensor  # [T, K]
    added: torch.Tensor
    kept: bool = True  # whether something besides one norm reads it
    shape: torch.Size | None = None  # of the result, where it is not [T, K]
    result: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        """The sum, float32 [T, K]."""
        if self.result is None:
            added = self.added if self.added.dim() == self.stream.dim() else self.added.sum(0)
            self.result = self.stream.float() + added.float()
        return self.result


@dataclass
class Parts:
    """A product in parts float32 [P, T, N], which its reader adds up."""

    parts: torch.Tensor

    def tensor(self) -> torch.Tensor:
        """The product, [T, N]."""
        return self.parts.sum(0)


__all__ = ["Normed", "Parts", "Product", "Sum"]
