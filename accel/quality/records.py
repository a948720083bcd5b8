"""A quality report as frozen dataclasses: what is known of a bundle's variants."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from accel.errors import EngineError
from accel.manifest import Quality, Quantization
from accel.quality.measure import Gate
from accel.schema import to_dict
from accel.spec import ArchSpec


@dataclass(frozen=True)
class VariantReport:
    """One variant.

    Attributes:
        name, dtype: As in the manifest.
        targets: What it has graphs for.
        quality: None where it is not known; ``missing`` then says why.
        quantization: None where nothing was rounded to integers.
        measured: Whether ``quality`` was measured just now; else it was stored in the manifest.
    """

    name: str
    dtype: str
    targets: tuple[str, ...]
    quality: Quality | None
    quantization: Quantization | None
    measured: bool = False
    missing: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that ``accel report`` shows; ``accel.quality`` has ``render_text`` and ``render_page`` for it.

    Attributes:
        path: The bundle's directory.
        source: What it was exported from.
        variants: fp32 first.
        saved: Whether what was measured is in the manifest now.
    """

    path: str
    source: str
    accel_version: str
    arch: ArchSpec
    variants: tuple[VariantReport, ...]
    saved: bool = False

    def variant(self, name: str) -> VariantReport:
        """One of them; KeyError where there is none of this name."""
        return next(item for item in self.variants if item.name == name)

    def hold(self, gate: Gate) -> None:
        """Holds every variant to a limit.

        Raises:
            QualityError: One lost more than it may.
            EngineError: There is a limit, and a variant that was not measured.
        """
        for item in self.variants:
            if item.quality is not None:
                gate.hold(item.name, item.quality, self.path)
            elif gate != Gate():
                what = f"The variant {item.name} was not measured: {item.missing}"
                raise EngineError(what, where=self.path, remedy="Measure it where it runs, or leave it out")

    def to_json(self) -> str:
        """One JSON object; ratios and perplexities beside what they are made of."""
        data = to_dict(self)
        for item, plain in zip(self.variants, data["variants"], strict=True):
            if item.quality is not None:
                _add_derived(item.quality, plain["quality"])
        return json.dumps(data, indent=1, allow_nan=False)


def _add_derived(quality: Quality, plain: dict[str, Any]) -> None:
    plain |= {"byte_ratio": quality.byte_ratio, "number_ratio": quality.number_ratio}
    likelihood = quality.likelihood
    if likelihood is not None:
        for name in ("perplexity", "reference_perplexity"):
            value = getattr(likelihood, name)
            plain["likelihood"][name] = value if value < float("inf") else None


__all__ = ["Report", "VariantReport"]
