"""8-bit floats: which products take them, and the scales of their inputs, from the largest values on text.

Weights become E4M3 numbers when a target stores them: one scale per matrix is enough, as numbers of four exponent bits
are as fine near zero as at the end of their range. Inputs get one scale per value for the same reason, so that nothing
is folded and nothing searched: the largest magnitude on the calibration text lies at 448.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from accel.compress.calibrate import Sweep, feeds_of, products_of, rows_of
from accel.compress.layers import Layer, find_layers
from accel.compress.progress import Progress, Silent
from accel.compress.report import LayerReport, QuantizationReport
from accel.compress.tensors import check_weight
from accel.compress.texts import Calibration
from accel.compress.weights import read_weight
from accel.quantized_tensor import FLOAT8_MAX, float8_scale, round_float8
from accel.spec import ArchSpec

HEAD = "the LM head stays in 16 bits: each logit is an answer"


def calibrate_float8(
    model: ir.Model, arch: ArchSpec, calibration: Calibration, progress: Progress | None = None
) -> QuantizationReport:
    """Measures what the products of a float graph read.

    Args:
        model: Canonical, with float weights; left as it is.
        calibration: Text to run.

    Returns:
        The layers that become 8-bit floats, with the errors of their weights; ``input_scales`` are their inputs' steps:
        x is near E4M3(x / step) * step.

    Raises:
        InputError: NaN or infinite weights.
    """
    progress = progress or Silent()
    layers, kept = find_layers(model, arch)
    chosen = [layer for layer in layers if layer.role == "linear"]
    kept = {**kept, **{layer.name: HEAD for layer in layers if layer.role in ("head", "tied")}}
    progress.stage("Measuring the inputs", 4 * sum(layer.parameters for layer in chosen))
    products = products_of(chosen)
    scales: dict[str, float] = {}
    reports: dict[str, LayerReport] = {}

    def visit(node: ir.Node, inputs: list[Any]) -> None:
        layer = products[node]
        peak = max(float(rows.abs().max()) for rows in rows_of(inputs))
        scales[layer.name] = max(scales.get(layer.name, 0.0), float(np.float32(peak / FLOAT8_MAX)))
        if layer.name not in reports:
            reports[layer.name] = _report(layer)
            progress.advance(4 * layer.parameters)

    Sweep(model, [feeds_of(model, arch, sample, logits=True) for sample in calibration.samples], products).run(visit)
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    size = sum(tensor.nbytes for tensor in tensors)
    return QuantizationReport(
        "fp8", "max", tuple(reports[layer.name] for layer in chosen), kept,
        parameters=sum(tensor.size for tensor in tensors),
        bytes_before=size,
        bytes_after=size - 3 * sum(layer.parameters for layer in chosen),
        scales=len(chosen),
        calibration_tokens=calibration.tokens,
        calibration_sha256=calibration.sha256,
        input_scales=scales,
    )  # fmt: skip


def _report(layer: Layer) -> LayerReport:
    weight = read_weight(layer)
    check_weight(weight, layer.name)
    scale = float8_scale(weight)
    norm = float(np.linalg.norm(weight))
    lost = float(np.linalg.norm(weight - round_float8(weight, scale).astype(np.float32) * scale))
    return LayerReport(layer.name, layer.role, layer.shape, 8, 0, lost / norm if norm else 0.0, weight.size)


__all__ = ["calibrate_float8"]
