"""What a quantisation did, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from accel.compress.layers import Role


@dataclass(frozen=True)
class LayerReport:
    """One weight that became integers.

    Attributes:
        name: Of the initializer.
        role: What the layer is for.
        shape: (outputs N, inputs K).
        bits: Of each value.
        group: Inputs that share a scale; 0: the whole row.
        error: || y - y' || / || y || over the calibration text with y the layer's outputs, or the same of its weights
            where ``QuantizationReport.error_of`` says so.
        nbytes: Packed values and scales.
        note: What was done otherwise than asked, and why; empty: nothing.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    bits: int
    group: int
    error: float
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """A quantised graph, in numbers.

    Attributes:
        scheme: Name of the variant.
        algorithm: What chose the integers, such as ``rtn`` or ``awq+gptq``.
        layers: In graph order.
        kept: Matrices that stay float, and why.
        parameters: Numbers in all of the model's initializers.
        bytes_before, bytes_after: Of all initializers; after: packed integers and scales where there are some.
        scales: How many scales were added.
        calibration_tokens: Tokens that the algorithm saw; 0: it needs none.
        calibration_sha256: Of their ids.
        error_of: What the layers' errors are relative to.
        input_scales: Static activations: by weight, the step between two integers of the layer's input.
        notes: Decisions that the algorithm made by measuring.
    """

    scheme: str
    algorithm: str
    layers: tuple[LayerReport, ...]
    kept: Mapping[str, str]
    parameters: int
    bytes_before: int
    bytes_after: int
    scales: int = 0
    calibration_tokens: int = 0
    calibration_sha256: str | None = None
    error_of: Literal["weights", "outputs"] = "weights"
    input_scales: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after."""
        return self.bytes_before / self.bytes_after

    @property
    def bits_per_weight(self) -> float:
        """Over all parameters of the model, scales and float tensors included."""
        return 8 * self.bytes_after / self.parameters

    def worst(self, count: int = 5) -> tuple[LayerReport, ...]:
        """The layers of largest error, the largest first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.error)[:count])


__all__ = ["LayerReport", "QuantizationReport"]
