"""The two passes over the calibration text: factors are folded first, then each layer is rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from accel.compress.awq import search_factor
from accel.compress.calibrate import Rounding, Sweep, feeds_of, products_of, rows_of, second_moments, some_rows
from accel.compress.folding import Site, find_sites, fold
from accel.compress.gptq import DAMPING, gptq, output_error
from accel.compress.layers import Layer
from accel.compress.plan import FLOAT_BITS, Choice
from accel.compress.progress import Progress
from accel.compress.rtn import round_to_nearest
from accel.compress.smoothquant import search_smoothing, static_step
from accel.compress.tensors import check_moments
from accel.compress.weights import read_weight, weight_error, write_quantized
from accel.graph.quantized import quantized_of
from accel.quantized_tensor import QuantizedTensor
from accel.scheme import Activations
from accel.spec import ArchSpec

Folding = Literal["awq", "smoothquant"]
Rounder = Literal["rtn", "gptq"]
SOME_ROWS = 512  # inputs that activations' rounding is tried on
TIED_DAMPING = 1.0  # a tied table's rows are looked up as they are: their own error counts as much as the logits'


@dataclass
class Work:
    """A graph that is being quantised.

    Attributes:
        model: Changed in place.
        arch: The model's.
        layers: Those of the graph that may become integers.
        choices: Widths and groups by the layers' names.
        samples: Token ids of the calibration text.
        activations: Whether products round their inputs.
        progress: Told the work.
        notes: What was decided on the way.
        errors: || y - y' || / || y || of each layer's outputs, by name.
        input_scales: Steps of static inputs, by the weight's name.
        mixed: Some layers may get a higher precision afterwards: what that takes is kept.
        floats: The layers' weights before rounding, factors folded in, by name.
        finer_errors: As ``errors``, of layers of 4 bits if they had 8.
        error_of: ``weights`` where no text was looked at.
    """

    model: ir.Model
    arch: ArchSpec
    layers: Sequence[Layer]
    choices: Mapping[str, Choice]
    samples: Sequence[NDArray[np.int64]]
    activations: Activations
    progress: Progress
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    input_scales: dict[str, float] = field(default_factory=dict)
    mixed: bool = False
    floats: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    finer_errors: dict[str, float] = field(default_factory=dict)
    error_of: Literal["weights", "outputs"] = "weights"

    @property
    def quantized(self) -> list[Layer]:
        """The layers that become integers."""
        return [layer for layer in self.layers if self.choices[layer.name].bits != FLOAT_BITS]

    def write(self, layer: Layer, quantized: QuantizedTensor) -> None:
        """Makes the integers a layer's weight."""
        if self.mixed:
            assert layer.weight.const_value is not None
            self.floats[layer.name] = layer.weight.const_value
        write_quantized(layer, quantized)

    def measure(self, layer: Layer, weight: NDArray[np.float32], moments: Any) -> None:
        """Notes the error of a rounded layer's outputs."""
        quantized, choice = quantized_of(layer.weight), self.choices[layer.name]
        assert quantized is not None, layer.name
        self.errors[layer.name] = output_error(weight, quantized, moments)
        if self.mixed and choice.bits < 8:
            finer = round_to_nearest(weight, 8, choice.group, name=layer.name)
            self.finer_errors[layer.name] = output_error(weight, finer, moments)

    def sweep(self, stops: Sequence[ir.Node], advance: Callable[[int], None] | None = None) -> Sweep:
        """A pass of the calibration text through the graph as it is now."""
        feeds = (feeds_of(self.model, self.arch, sample, logits=True) for sample in self.samples)
        return Sweep(self.model, feeds, stops, advance)


def fold_factors(work: Work, folding: Folding) -> None:
    """Finds each site's best factor on the float graph's own inputs, then folds them all."""
    sites = {site.products[0]: site for site in find_sites(work.model, work.quantized)}
    factors: list[tuple[Site, NDArray[np.float32], float]] = []
    work.progress.stage("Measuring channels", 4 * sum(x.parameters for site in sites.values() for x in site.layers))

    def visit(node: ir.Node, inputs: list[Any]) -> None:
        site = sites[node]
        weights = [read_weight(layer) for layer in site.layers]
        moments = second_moments(inputs)
        check_moments(moments, site.layers[0].name)
        if folding == "awq":
            factor, ratio = search_factor(site, weights, work.choices, moments)
        else:
            peaks = np.max([rows.abs().amax(0).numpy() for rows in rows_of(inputs)], axis=0)
            factor, ratio = search_smoothing(site, weights, peaks, some_rows(inputs, SOME_ROWS), work.activations)
        if factor is not None:
            factors.append((site, factor, ratio))
        work.progress.advance(sum(weight.nbytes for weight in weights))

    work.sweep(list(sites)).run(visit)
    for site, factor, _ in factors:
        fold(site, factor)
    mean = f", to {np.mean([ratio for *_, ratio in factors]):.0%} of the squared error" if factors else ""
    work.notes.append(f"{folding}: factors folded at {len(factors)} of {len(sites)} places{mean}")


def tied_moments(work: Work, layer: Layer) -> Any:
    """X^T X of a tied head's inputs in the graph as it is now."""
    found = []
    sweep = work.sweep(layer.linears[-1:], work.progress.advance)
    work.progress.stage("Measuring the head's inputs", len(sweep))
    sweep.run(lambda node, inputs: found.append(second_moments(inputs)))
    return found[0]


def round_layers(work: Work, algorithm: Rounder, act_order: bool = False, sweeps: int = 0) -> None:
    """Rounds the layers in graph order, each on the inputs that the rounded layers before it give.

    Tables of ids come first, as everything starts from them; a tied one too.
    """
    settings = {"act_order": act_order, "sweeps": sweeps}
    work.error_of = "outputs"
    floats = {layer.name: read_weight(layer) for layer in work.quantized if layer.role == "tied"}
    total = 4 * sum(layer.parameters for layer in work.quantized)
    told = False
    for layer in work.quantized:
        if layer.gathers:
            gains = layer.role == "tied" and algorithm == "gptq" and work.choices[layer.name].bits < 8
            moments = tied_moments(work, layer) if gains else None
            if gains or not told:  # anew after another stage
                work.progress.stage("Quantising", total)
                told = True
            weight = read_weight(layer)
            quantized = _rounded(layer, work.choices[layer.name], moments, settings)
            work.write(layer, quantized)
            if not layer.linears:  # its rows are its outputs
                work.errors[layer.name] = weight_error(weight, quantized)
                work.progress.advance(weight.nbytes)
    if not told:
        work.progress.stage("Quantising", total)
    products = products_of(work.quantized)
    done: set[ir.Node] = set()
    roundings: dict[ir.Value, Rounding | None] = {}

    def visit(node: ir.Node, inputs: list[Any]) -> Rounding | None:
        value = node.inputs[0]
        assert value is not None
        if node not in done:
            moments = second_moments(inputs)
            check_moments(moments, products[node].name)
            step = _step(inputs) if work.activations == "static" else None
            roundings[value] = _rounding(work.activations, step)
            for other in [use.node for use in value.uses() if use.node in products]:
                done.add(other)
                layer = products[other]
                if layer.name not in work.errors:
                    weight = floats.get(layer.name)
                    if weight is None:
                        weight = read_weight(layer)
                        work.write(layer, _rounded(layer, work.choices[layer.name], moments, settings, algorithm))
                    work.measure(layer, weight, moments)
                    work.progress.advance(weight.nbytes)
                if step is not None:
                    work.input_scales[layer.name] = max(step, work.input_scales.get(layer.name, 0.0))
        return roundings[value]

    work.sweep(list(products)).run(visit)


def _rounded(
    layer: Layer, choice: Choice, moments: Any, settings: Mapping[str, Any], algorithm: Rounder = "gptq"
) -> QuantizedTensor:
    weight = read_weight(layer)
    if moments is None or algorithm == "rtn":
        return round_to_nearest(weight, choice.bits, choice.group, name=layer.name)
    damping = TIED_DAMPING if layer.gathers else DAMPING
    return gptq(weight, moments, choice.bits, choice.group, name=layer.name, damping=damping, **settings)


def _step(inputs: list[Any]) -> float:
    peak = max(float(rows.abs().max()) for rows in rows_of(inputs))
    return static_step(peak, some_rows(inputs, SOME_ROWS))


def _rounding(activations: Activations, step: float | None) -> Rounding | None:
    from accel.graph.evaluation.canonical import round_input, row_step

    if activations == "dynamic":
        return lambda x: round_input(x, row_step(x))
    return None if step is None else lambda x: round_input(x, step)


__all__ = ["Folding", "Rounder", "Work", "fold_factors", "round_layers"]
