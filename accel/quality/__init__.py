"""What a variant costs and gains against fp32: measured through the engines that run it, and shown."""

from __future__ import annotations

from accel.quality.collect import report, save_quality
from accel.quality.measure import Gate, Reference, Settings, measure_reference, measure_variant
from accel.quality.page import render_page
from accel.quality.records import Report, VariantReport
from accel.quality.text import render_text
from accel.quality.text_set import TextSet, resolve_text

__all__ = [
    "Gate",
    "Reference",
    "Report",
    "Settings",
    "TextSet",
    "VariantReport",
    "measure_reference",
    "measure_variant",
    "render_page",
    "render_text",
    "report",
    "resolve_text",
    "save_quality",
]
