"""Traced graph -> canonical graph: an ordered list of small passes, each reported."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from accel.graph.checks import check_attention
from accel.graph.clean import clean
from accel.graph.fusions.gelu import fuse_gelu_tanh
from accel.graph.fusions.indexing import simplify_indexing
from accel.graph.fusions.linear import fuse_linear
from accel.graph.fusions.rms_norm import fuse_rms_norm
from accel.graph.fusions.rotary import fuse_rotary
from accel.manifest import PassReport
from accel.spec import ArchSpec

Pass = Callable[[ir.Model], int]

CANONICAL_PASSES: tuple[tuple[str, Pass], ...] = (
    ("linear", fuse_linear),
    ("clean", clean),
    ("indexing", simplify_indexing),
    ("rms_norm", fuse_rms_norm),
    ("gelu_tanh", fuse_gelu_tanh),
    ("rotary", fuse_rotary),
    ("clean_again", clean),
)


def run_passes(model: ir.Model, passes: tuple[tuple[str, Pass], ...]) -> tuple[PassReport, ...]:
    """Runs passes in order, in place; each returns how often it applied."""
    reports = []
    for name, apply in passes:
        before = model.graph.num_nodes()
        applied = apply(model)
        common.RemoveUnusedNodesPass()(model)
        reports.append(PassReport(name, before, model.graph.num_nodes(), {name: applied}))
    return tuple(reports)


def optimize(model: ir.Model, arch: ArchSpec) -> tuple[PassReport, ...]:
    """Makes a traced model canonical, in place.

    Raises:
        FusionError: an attention layer went missing on the way.
    """
    _strip_trace_metadata(model)
    reports = run_passes(model, CANONICAL_PASSES)
    check_attention(model, arch)
    return reports


def _strip_trace_metadata(model: ir.Model) -> None:
    """Stack traces and file paths of the exporting machine do not belong in a bundle."""
    common.ClearMetadataAndDocStringPass()(model)
    model.graph.name = "main"
