"""A canonical graph and a scheme -> the same graph with integer weights, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from numpy.typing import NDArray

from accel.compress.layers import find_layers
from accel.compress.likelihood import mean_log_likelihood, measured_samples
from accel.compress.passes import Folding, Rounder, Work, fold_factors, round_layers
from accel.compress.plan import FLOAT_BITS, plan
from accel.compress.progress import Progress, Silent
from accel.compress.report import LayerReport, QuantizationReport
from accel.compress.rtn import round_to_nearest
from accel.compress.sensitivity import Budget, keep_worst
from accel.compress.tensors import check_finite
from accel.compress.texts import Calibration
from accel.compress.weights import read_weight, weight_error, write_quantized
from accel.errors import InputError
from accel.graph.quantized import quantized_of
from accel.schema import suggest
from accel.scheme import Scheme
from accel.spec import ArchSpec

HEAD_DROP = 0.01  # of Q that a head in 4 bits may cost before it gets 8
SWEEPS = 2  # of coordinate descent behind GPTQ


@dataclass(frozen=True)
class Algorithm:
    """What chooses the integers.

    Attributes:
        name: As the user says it.
        rounder: ``rtn`` or ``gptq``.
        folding: Which factors are folded first, if any.
    """

    name: str
    rounder: Rounder
    folding: Folding | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it looks at text."""
        return self.rounder == "gptq" or self.folding is not None


ALGORITHMS = {
    item.name: item
    for item in (
        Algorithm("rtn", "rtn"),
        Algorithm("gptq", "gptq"),
        Algorithm("awq", "rtn", "awq"),
        Algorithm("awq+gptq", "gptq", "awq"),
        Algorithm("smoothquant", "rtn", "smoothquant"),
        Algorithm("smoothquant+gptq", "gptq", "smoothquant"),
    )
}


def quantize_graph(
    model: ir.Model,
    arch: ArchSpec,
    scheme: Scheme,
    algorithm: str = "auto",
    calibration: Calibration | None = None,
    *,
    keep: Mapping[str, int] | None = None,
    head_bits: int | None = None,
    table_bits: int | None = None,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> tuple[ir.Model, QuantizationReport]:
    """Quantises a model's weights.

    Args:
        model: Canonical, in float32; left as it is.
        arch: The model's.
        scheme: One with integer weights.
        algorithm: ``rtn``, ``gptq``, ``awq``, ``awq+gptq``, ``smoothquant`` or ``smoothquant+gptq``. ``auto``: ``rtn``
            for 8 bits, ``smoothquant+gptq`` where inputs are rounded too, ``gptq`` for 4 bits; ``rtn`` without
            calibration.
        calibration: Text to look at, see ``accel.compress.texts``.
        keep: Names or patterns of weights -> bits of these layers: 4, 8, or 32 for float.
        head_bits: Of the head and a table tied to it. None: 8, or with 4-bit weights 4 where that costs a decoder less
            than 0.01 of Q on the calibration text.
        table_bits: Of an embedding table on its own; None: 8.
        budget: Keeps the layers that lose most in a higher precision, see ``accel.compress.sensitivity``.
        progress: Told the stages, and bytes of float weights as they are done.

    Returns:
        A model of the same nodes, whose quantised initializers hold an ``accel.graph.quantized.QuantizedWeight``, and
        the report.

    Raises:
        InputError: NaN or infinite weights, inputs that no group divides, unknown names, widths or algorithms, an
            algorithm that does not fit the scheme, one that needs calibration without any, or a budget that cannot be
            kept.
    """
    result, progress = model.clone(), progress or Silent()
    chosen = choose_algorithm(algorithm, scheme, calibration)
    _check_finite(model)
    layers, kept = find_layers(result, arch)
    samples = calibration.samples if calibration is not None else ()
    notes = []
    if head_bits is None and scheme.weight_bits == 4 and any(layer.role in ("head", "tied") for layer in layers):
        head_bits, note = _head_bits(model, arch, scheme, samples, progress)
        notes.append(note)
    choices = plan(layers, scheme, keep, head_bits, table_bits)
    work = Work(result, arch, layers, choices, samples, scheme.activations, progress, notes, mixed=budget is not None)
    if chosen.calibrated or scheme.activations == "static":
        if chosen.folding is not None:
            fold_factors(work, chosen.folding)
        round_layers(work, chosen.rounder, sweeps=SWEEPS)
    else:
        _round_weights(work)
    if budget is not None:
        keep_worst(work, budget, model)
    kept |= {name: choice.note for name, choice in choices.items() if choice.bits == FLOAT_BITS}
    return result, _summary(model, work, scheme, chosen, calibration, kept)


def _check_finite(model: ir.Model) -> None:
    """Refuses a damaged model before anything is computed: a NaN in a norm would be told of the layer after it.

    Raises:
        InputError: NaN or infinity among an initializer's floats.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape):  # type: ignore[arg-type]
            check_finite(tensor.numpy(), value.name or "")


def choose_algorithm(name: str, scheme: Scheme, calibration: Calibration | None) -> Algorithm:
    """The algorithm of a name that fits a scheme and what there is to look at.

    Raises:
        InputError: Unknown, unfit, or it needs calibration without any.
    """
    if name == "auto":
        chosen = ALGORITHMS[scheme.usual_algorithm if calibration is not None else "rtn"]
    elif name in ALGORITHMS:
        chosen = ALGORITHMS[name]
    else:
        raise InputError(f"unknown algorithm {name!r}", where="algorithm", remedy=suggest(name, ["auto", *ALGORITHMS]))
    if (chosen.folding == "smoothquant") != (scheme.activations != "none") and chosen.folding is not None:
        fits = "rounds no inputs" if scheme.activations == "none" else "rounds its inputs too"
        remedy = "Take auto, rtn, gptq or awq" if scheme.activations == "none" else "Take auto, rtn or smoothquant"
        raise InputError(f"{name} does not fit {scheme.name}, which {fits}", where="algorithm", remedy=remedy)
    if calibration is None and (chosen.calibrated or scheme.activations == "static"):
        what = f"{name} needs calibration text" if chosen.calibrated else f"{scheme.name} needs calibration text"
        remedy = "Give one, or token ids where the model has no tokenizer; w8a8-dyn and rtn do without"
        raise InputError(what, where="calibration", remedy=remedy)
    return chosen


def _head_bits(
    model: ir.Model, arch: ArchSpec, scheme: Scheme, samples: Sequence[NDArray], progress: Progress
) -> tuple[int, str]:
    """4 where a head (and a table tied to it) of 4 bits costs little, else 8; and why."""
    if arch.kind != "decoder" or not samples:
        return 8, "head in 8 bits: there is no text to measure 4 bits on"
    trial, some = model.clone(), measured_samples(samples)
    progress.stage("Measuring the head in 4 bits", 2 * sum(map(len, some)))
    layers, _ = find_layers(trial, arch)
    before = mean_log_likelihood(trial, arch, some, progress.advance)
    for layer in layers:
        if layer.role in ("head", "tied"):
            group = plan([layer], scheme, head_bits=4)[layer.name].group
            write_quantized(layer, round_to_nearest(read_weight(layer), 4, group, name=layer.name))
    drop = before - mean_log_likelihood(trial, arch, some, progress.advance)
    bits = 4 if drop <= HEAD_DROP else 8
    return bits, f"head in {bits} bits: rounded to 4 alone it costs {drop:.4f} of Q, {HEAD_DROP} are allowed"


def _round_weights(work: Work) -> None:
    """Each weight on its own: no text is needed."""
    work.progress.stage("Quantising", 4 * sum(layer.parameters for layer in work.quantized))
    for layer in work.quantized:
        choice, weight = work.choices[layer.name], read_weight(layer)
        quantized = round_to_nearest(weight, choice.bits, choice.group, name=layer.name)
        work.write(layer, quantized)
        work.errors[layer.name] = weight_error(weight, quantized)
        work.progress.advance(weight.nbytes)


def _summary(
    before: ir.Model,
    work: Work,
    scheme: Scheme,
    algorithm: Algorithm,
    calibration: Calibration | None,
    kept: Mapping[str, str],
) -> QuantizationReport:
    tensors = [value.const_value for value in before.graph.initializers.values() if value.const_value is not None]
    found = {layer: quantized_of(layer.weight) for layer in work.quantized}
    integers = {layer: item for layer, item in found.items() if item is not None}
    assert len(integers) == len(found)
    size = sum(tensor.nbytes for tensor in tensors)
    looked = algorithm.calibrated or scheme.activations == "static"
    return QuantizationReport(
        scheme.name, algorithm.name,
        tuple(
            LayerReport(
                layer.name, layer.role, layer.shape, item.bits, item.group, work.errors.get(layer.name, 0.0),
                item.nbytes, work.choices[layer.name].note,
            )
            for layer, item in integers.items()
        ),
        dict(kept),
        parameters=sum(tensor.size for tensor in tensors),
        bytes_before=size,
        bytes_after=size - sum(4 * item.values.size - item.nbytes for item in integers.values()),
        scales=sum(item.scales.size for item in integers.values()),
        calibration_tokens=calibration.tokens if calibration is not None and looked else 0,
        calibration_sha256=calibration.sha256 if calibration is not None and looked else None,
        error_of=work.error_of,
        input_scales=dict(work.input_scales),
        notes=tuple(work.notes),
    )  # fmt: skip


__all__ = ["ALGORITHMS", "choose_algorithm", "quantize_graph"]
