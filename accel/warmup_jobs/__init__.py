"""Warm-up jobs: plans which engines a fleet needs, builds those that are missing, runs them where there is a GPU."""

from accel.warmup_jobs.report import EngineLine, SummaryError, WarmupReport
from accel.warmup_jobs.run import warmup

__all__ = ["EngineLine", "SummaryError", "WarmupReport", "warmup"]
