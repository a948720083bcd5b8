"""What a variant costs and gains against fp32: measured through the engines that run it, and shown."""

from __future__ import annotations

from accel.quality.measure import Reference, Settings, measure_reference, measure_variant
from accel.quality.report import Report, VariantReport, report, save_quality
from accel.quality.text_set import TextSet, resolve_text

__all__ = [
    "Reference",
    "Report",
    "Settings",
    "TextSet",
    "VariantReport",
    "measure_reference",
    "measure_variant",
    "report",
    "resolve_text",
    "save_quality",
]
