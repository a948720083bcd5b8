"""Factors that are folded leave the model as it is, wherever they may go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from accel.compress.awq import channel_factor, search_factor
from accel.compress.calibrate import feeds_of, second_moments
from accel.compress.folding import find_sites, fold
from accel.compress.layers import find_layers
from accel.compress.plan import plan
from accel.compress.smoothquant import search_smoothing, smoothing_factor, static_step
from accel.compress.weights import read_weight
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.scheme import parse_scheme
from accel.spec import ArchSpec
from tests.compress.small import canonical
from tests.graph.small import normal

Get = Callable[[str], Path]
SITES = {
    "llama": {("norm", 3): 3, ("norm", 2): 3, ("gate", 1): 3, ("value", 1): 3, ("norm", 1): 1},
    "gemma2": {("norm", 3): 3, ("norm", 2): 3, ("gate", 1): 3, ("value", 1): 3},  # not at its tied head
    "granite": {("norm", 3): 3, ("norm", 2): 3, ("gate", 1): 3, ("value", 1): 3, ("norm", 1): 1},
    "olmo2": {("gate", 1): 3, ("value", 1): 3, ("norm", 1): 1},  # norms behind the products, and the head's
    "gpt2": {("norm", 1): 6},  # Conv1D; queries, keys and values in one product
    "phi3": {("norm", 1): 7},
    "bert": {("value", 1): 3},  # the residual reads the norms' outputs too
    "modernbert": {("norm", 1): 5},
}


def outputs(model: ir.Model, arch: ArchSpec) -> NDArray[np.float32]:
    ids = np.random.default_rng(0).integers(3, arch.vocab_size, 24)
    found = TorchGraph(model).run(feeds_of(model, arch, ids, logits=True))
    return found["logits" if arch.kind == "decoder" else "last_hidden_state"]


@pytest.mark.parametrize("family", SITES)
def test_folding_changes_nothing(family: str, bundle_of: Get) -> None:
    model, arch = canonical(bundle_of(family))
    before = outputs(model, arch)
    layers, _ = find_layers(model, arch)
    sites = find_sites(model, layers)
    assert Counter((site.kind, len(site.layers)) for site in sites) == SITES[family]
    weights = {layer.name: read_weight(layer) for layer in layers}
    for index, site in enumerate(sites):
        width = site.layers[0].shape[1]
        fold(site, site.share(np.exp(normal(width, seed=index))))
    after = outputs(model, arch)
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    changed = {layer.name for layer in layers if not np.array_equal(read_weight(layer), weights[layer.name])}
    assert changed >= {layer.name for site in sites for layer in site.layers}


def test_heads_that_share_values_share_factors(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("llama"))
    layers, _ = find_layers(model, arch)
    site = next(site for site in find_sites(model, layers) if site.kind == "value")
    assert site.shared == (4, 2, 16)
    shared = site.share(np.exp(normal(64))).reshape(2, 2, 16)
    assert np.array_equal(shared[:, 0], shared[:, 1]) and not np.array_equal(shared[0], shared[1])


def test_channel_factors() -> None:
    size = np.array([1.0, 4.0, 16.0, 0.0])
    assert channel_factor(size, 0.5) == pytest.approx([0.5, 1, 2, 1])
    assert channel_factor(size, 0.0) == pytest.approx([1, 1, 1, 1])
    assert channel_factor(np.zeros(3), 0.5) == pytest.approx([1, 1, 1])


def test_smoothing_factors() -> None:
    """max|X|^a / max|W|^(1-a), but for a factor common to all channels."""
    inputs, columns = np.array([1.0, 9.0, 4.0]), np.array([1.0, 1.0, 4.0])
    found = smoothing_factor(inputs, columns, 0.5)
    assert found / found[0] == pytest.approx([1, 3, 1])
    assert np.isfinite(smoothing_factor(np.array([0.0, 2.0]), np.array([1.0, 0.0]), 0.5)).all()


def test_awq_protects_large_channels(bundle_of: Get) -> None:
    import torch

    model, arch = canonical(bundle_of("llama"))
    layers, _ = find_layers(model, arch)
    site = find_sites(model, layers)[0]
    weights = [read_weight(layer) for layer in site.layers]
    choices = plan(layers, parse_scheme("w4g32"))
    sizes = torch.ones(64)
    sizes[5] = 60.0
    rows = torch.from_numpy(normal(256, 64)) * sizes
    factor, ratio = search_factor(site, weights, choices, second_moments([rows]))
    assert factor is not None and factor.argmax() == 5 and ratio < 0.7
    even, ratio = search_factor(site, weights, choices, torch.eye(64))
    assert even is None and ratio == 1.0


def test_smoothing_only_where_it_helps(bundle_of: Get) -> None:
    import torch

    model, arch = canonical(bundle_of("llama"))
    layers, _ = find_layers(model, arch)
    site = find_sites(model, layers)[0]
    weights = [read_weight(layer) for layer in site.layers]
    rows = torch.from_numpy(normal(256, 64))
    rows[:, 5] *= 60.0
    for activations in ("dynamic", "static"):
        factor, ratio = search_smoothing(site, weights, rows.abs().amax(0).numpy(), rows, activations)  # type: ignore[arg-type]
        assert factor is not None and factor.argmax() == 5 and ratio < 0.7
    flat = torch.ones(16, 64)
    factor, ratio = search_smoothing(site, weights, np.ones(64, np.float32), flat, "dynamic")
    assert factor is None and ratio == 1.0


def test_static_steps() -> None:
    import torch

    rows = torch.from_numpy(normal(64, 64))
    peak = float(rows.abs().max())
    assert 0.6 * peak / 127 < static_step(peak, rows) <= peak / 127 * 1.0001
    assert static_step(10 * peak, rows) < 5 * peak / 127, "an outlier that no row shows is cut"
    assert static_step(0.0, torch.zeros(4, 4)) == 1.0
