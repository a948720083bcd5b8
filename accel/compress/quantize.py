"""A canonical graph and a scheme -> the same graph with integer weights, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.compress.layers import Layer, find_layers
from accel.compress.plan import FLOAT_BITS, Choice, plan
from accel.compress.report import LayerReport, QuantizationReport
from accel.compress.rtn import round_to_nearest
from accel.graph.quantized import QuantizedWeight, quantized_of
from accel.quantized_tensor import QuantizedTensor
from accel.scheme import Scheme
from accel.spec import ArchSpec


class Progress(Protocol):
    """What is told of the work: ``accel.exporter.progress.ExportProgress`` and the like."""

    def stage(self, name: str, total: int | None = None) -> None: ...

    def advance(self, count: int) -> None: ...


class Silent:
    """Tells nobody."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""


def quantize_graph(
    model: ir.Model,
    arch: ArchSpec,
    scheme: Scheme,
    *,
    keep: Mapping[str, int] | None = None,
    head_bits: int | None = None,
    table_bits: int | None = None,
    progress: Progress | None = None,
) -> tuple[ir.Model, QuantizationReport]:
    """Quantises a model's weights.

    Args:
        model: Canonical, in float32; left as it is.
        arch: The model's.
        scheme: One with integer weights.
        keep: Names or patterns of weights -> bits of these layers: 4, 8, or 32 for float.
        head_bits: Of the head and a table tied to it; None: the scheme's.
        table_bits: Of an embedding table on its own; None: 8.
        progress: Told the stages, and bytes of float weights as they are done.

    Returns:
        A model of the same nodes, whose quantised initializers hold an ``accel.graph.quantized.QuantizedWeight``, and
        the report.

    Raises:
        InputError: NaN or infinite weights, inputs that no group divides, unknown names or widths.
    """
    result, progress = model.clone(), progress or Silent()
    layers, kept = find_layers(result, arch)
    choices = plan(layers, scheme, keep, head_bits, table_bits)
    progress.stage("Quantising", 4 * sum(layer.parameters for layer in layers))
    reports = []
    for layer in layers:
        choice = choices[layer.name]
        if choice.bits == FLOAT_BITS:
            kept[layer.name] = choice.note
        else:
            weight = read_weight(layer)
            quantized = round_to_nearest(weight, choice.bits, choice.group, name=layer.name)
            write_quantized(layer, quantized)
            reports.append(_report(layer, choice, quantized, weight_error(weight, quantized)))
        progress.advance(4 * layer.parameters)
    return result, summarize(model, result, scheme, "rtn", reports, kept)


def read_weight(layer: Layer) -> NDArray[np.float32]:
    """The layer's weights as float32 [N, K]."""
    tensor = layer.weight.const_value
    assert tensor is not None, layer.name
    array = tensor.numpy()
    return np.ascontiguousarray(array if layer.transposed else array.T, dtype=np.float32)


def write_quantized(layer: Layer, quantized: QuantizedTensor) -> None:
    """Makes the integers the layer's weight."""
    layer.weight.const_value = QuantizedWeight(quantized, layer.transposed, layer.name)


def weight_error(weight: NDArray[np.float32], quantized: QuantizedTensor) -> float:
    """|| W - W' || / || W ||, Frobenius."""
    norm = float(np.linalg.norm(weight))
    return float(np.linalg.norm(weight - quantized.dequantize())) / norm if norm else 0.0


def _report(layer: Layer, choice: Choice, quantized: QuantizedTensor, error: float) -> LayerReport:
    return LayerReport(
        layer.name, layer.role, layer.shape, choice.bits, choice.group, error, quantized.nbytes, choice.note
    )  # fmt: skip


def summarize(
    before: ir.Model,
    after: ir.Model,
    scheme: Scheme,
    algorithm: str,
    layers: list[LayerReport],
    kept: Mapping[str, str],
) -> QuantizationReport:
    """The report with its totals."""
    tensors = [value.const_value for value in before.graph.initializers.values() if value.const_value is not None]
    found = [quantized_of(value) for value in after.graph.initializers.values()]
    replaced = sum(4 * item.values.size for item in found if item is not None)
    size = sum(tensor.nbytes for tensor in tensors)
    return QuantizationReport(
        scheme.name, algorithm, tuple(layers), dict(kept),
        parameters=sum(tensor.size for tensor in tensors),
        bytes_before=size,
        bytes_after=size - replaced + sum(item.nbytes for item in found if item is not None),
        scales=sum(item.scales.size for item in found if item is not None),
    )  # fmt: skip


__all__ = ["quantize_graph"]
