"""What a bundle holds, read from its manifest and graphs without its weights: text, JSON or one HTML page."""

from __future__ import annotations

from accel.inspection.collect import inspect
from accel.inspection.page import render_page
from accel.inspection.report import Inspection
from accel.inspection.text import render_text

__all__ = ["Inspection", "inspect", "render_page", "render_text"]
