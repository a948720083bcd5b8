"""Random tensors, outputs that nobody wrote yet, and how far a result may be from its reference."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton has no build for this system")


class Maker:
    """Makes tensors of one type on one device, the same ones in every run.

    Attributes:
        dtype: Of what it makes, unless told otherwise.
    """

    def __init__(self, device: Any, dtype: Any = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: Any = None) -> Any:
        """Normally distributed numbers."""
        return (torch.randn(shape, generator=self._generator) * scale).to(self.device, dtype or self.dtype)

    def poison(self, *shape: int, dtype: Any = None) -> Any:
        """An output nobody wrote: NaN."""
        return torch.full(shape, float("nan"), device=self.device, dtype=dtype or self.dtype)

    def ints(self, *numbers: int, dtype: Any = torch.int32) -> Any:
        """Integers, one axis."""
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def angles(self, positions: int, half: int) -> tuple[Any, Any]:
        """Tables of a rotation, float32 [positions, half]."""
        angles = torch.rand(positions, half, generator=self._generator).to(self.device) * 6.2
        return angles.cos(), angles.sin()


def error_of(actual: Any, expected: Any) -> float:
    """The largest error relative to the largest expected value; infinity where a result is missing."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    if not actual.isfinite().all():
        return float("inf")
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """At most ``tolerance`` from the reference."""
    error = error_of(actual, expected)
    assert error <= tolerance, f"error {error:.2e}, tolerance {tolerance:.0e}"
