"""Tiny canonical graphs: exported models of one family each, as bundles hold them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from accel.bundle import Bundle
from accel.graph.save import load_canonical
from accel.spec import ArchSpec


def canonical(bundle: Path) -> tuple[ir.Model, ArchSpec]:
    """A bundle's canonical graph and what the model is."""
    opened = Bundle.open(bundle)
    return load_canonical(opened.file("canonical.onnx")), opened.manifest.arch
