"""Warm-up jobs: plans which engines a fleet needs, builds what is missing, runs and measures them where a GPU is."""

from accel.warmup_jobs.report import EngineLine, MeasuredLine, SummaryError, WarmupReport
from accel.warmup_jobs.run import warmup

__all__ = ["EngineLine", "MeasuredLine", "SummaryError", "WarmupReport", "warmup"]
