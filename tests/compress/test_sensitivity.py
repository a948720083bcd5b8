from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from accel.compress.likelihood import mean_log_likelihood, measured_samples
from accel.compress.quantize import quantize_graph
from accel.compress.sensitivity import Budget
from accel.compress.texts import Calibration
from accel.errors import InputError
from accel.graph.quantized import quantized_of
from accel.scheme import parse_scheme
from tests.compress.small import canonical
from tests.compress.test_quantize import sample

Get = Callable[[str], Path]
SCHEME = parse_scheme("w4g32")


def test_size_is_filled_with_the_worst_layers(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("olmo2"))
    calibration = sample(arch)
    _, plain = quantize_graph(model, arch, SCHEME, "gptq", calibration, head_bits=4)
    limit = plain.bytes_after + 20_000
    result, mixed = quantize_graph(
        model, arch, SCHEME, "gptq", calibration, head_bits=4, budget=Budget(max_bytes=limit)
    )  # fmt: skip
    assert limit - 2048 < mixed.bytes_after <= limit
    before = {layer.name: layer for layer in plain.layers}
    raised = [layer for layer in mixed.layers if layer.bits > before[layer.name].bits]
    assert raised and all(layer.error < 0.2 * before[layer.name].error for layer in raised)
    assert all("raised: it lost" in layer.note and "output" in layer.note for layer in raised)
    left = [layer for layer in mixed.layers if layer.bits == 4]

    def worth(name: str) -> float:
        return before[name].error ** 2 / before[name].shape[0] / before[name].shape[1]

    best, rest = ([worth(layer.name) for layer in layers] for layers in (raised, left))
    assert np.mean(best) > 1.2 * np.mean(rest) and max(best) > max(rest)
    for layer in mixed.layers:
        found = quantized_of(result.graph.initializers[layer.name])
        assert found is not None and found.bits == layer.bits and found.nbytes == layer.nbytes
    assert f"{len(raised)} of {len(plain.layers)} layers raised to a higher precision" in mixed.notes[-1]
    bits = 8 * limit / plain.parameters
    _, same = quantize_graph(
        model, arch, SCHEME, "gptq", calibration, head_bits=4, budget=Budget(bits_per_weight=bits)
    )  # fmt: skip
    assert abs(same.bytes_after - mixed.bytes_after) < 4096


def test_a_layers_error_has_a_limit(bundle_of: Get) -> None:
    """Without text, it is the weights' error; what is above the limit in 8 bits becomes float."""
    model, arch = canonical(bundle_of("olmo2"))
    _, plain = quantize_graph(model, arch, SCHEME, head_bits=4)
    limit = float(np.median([layer.error for layer in plain.layers]))
    _, mixed = quantize_graph(model, arch, SCHEME, head_bits=4, budget=Budget(max_error=limit))
    assert max(layer.error for layer in mixed.layers) <= limit and mixed.error_of == "weights"
    assert {layer.bits for layer in mixed.layers} == {4, 8}
    result, floats = quantize_graph(model, arch, parse_scheme("w8g32"), budget=Budget(max_error=1e-6))
    assert not floats.layers and floats.bytes_after == floats.bytes_before
    assert all("raised: it lost 0." in reason for reason in floats.kept.values())
    for name, value in result.graph.initializers.items():
        assert value.const_value is not None
        assert np.array_equal(value.const_value.numpy(), model.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]


def test_folded_factors_stay_with_raised_layers(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("llama"))
    calibration = sample(arch)
    result, report = quantize_graph(
        model, arch, parse_scheme("w8a8"), "smoothquant", calibration, budget=Budget(max_error=1e-6)
    )
    assert not report.layers and not report.input_scales
    expected, found = (mean_log_likelihood(item, arch, calibration.samples) for item in (model, result))
    assert found == pytest.approx(expected, abs=1e-4)


def test_as_few_layers_as_the_likelihood_needs(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("llama"))
    text = own_words(model, arch)
    reference = mean_log_likelihood(model, arch, measured_samples(text.samples))

    def drop(budget: Budget | None) -> tuple[float, int]:
        result, report = quantize_graph(model, arch, SCHEME, "rtn", text, head_bits=8, budget=budget)
        raised = sum("raised" in layer.note for layer in report.layers)
        return reference - mean_log_likelihood(result, arch, measured_samples(text.samples)), raised

    whole, _ = drop(None)
    half, raised = drop(Budget(max_q_drop=whole / 2))
    assert whole > 0.02 and 0 < half <= whole / 2 and 0 < raised < 22
    assert drop(Budget(max_q_drop=2 * whole)) == (whole, 0)


def own_words(model, arch) -> Calibration:  # type: ignore[no-untyped-def]
    """Text that the model itself is sure of: each token the one it likes best."""
    from accel.compress.calibrate import feeds_of
    from accel.graph.evaluation.torch_graph import TorchGraph

    graph, rows = TorchGraph(model), []
    for first in range(3, 15):
        ids = [first]
        for _ in range(40):
            ids.append(int(graph.run(feeds_of(model, arch, np.array(ids)))["logits"][-1].argmax()))
        rows.append(np.array(ids))
    return Calibration("given", tuple(rows))


def test_budgets_that_cannot_be_kept(bundle_of: Get) -> None:
    model, arch = canonical(bundle_of("olmo2"))
    with pytest.raises(InputError, match=r"the scheme alone takes \d+,\d+ bytes, 1,000 are allowed \(at budget\)"):
        quantize_graph(model, arch, SCHEME, budget=Budget(max_bytes=1000))
    _, plain = quantize_graph(model, arch, SCHEME, head_bits=4)
    with pytest.raises(InputError, match=r"this quality takes .* and 10 are left.*a larger loss"):
        budget = Budget(max_bytes=plain.bytes_after + 10, max_error=0.01)
        quantize_graph(model, arch, SCHEME, head_bits=4, budget=budget)
    with pytest.raises(InputError, match=r"every layer in float32: nothing would be rounded .*lower limit"):
        quantize_graph(model, arch, parse_scheme("w8g32"), budget=Budget(max_bytes=1 << 40))
    with pytest.raises(InputError, match="there is no Q to measure.*Give calibration text"):
        quantize_graph(model, arch, SCHEME, budget=Budget(max_q_drop=0.1))
    with pytest.raises(InputError, match="max_bytes is -5"):
        Budget(max_bytes=-5)
    encoder, of_encoder = canonical(bundle_of("bert"))
    with pytest.raises(InputError, match="there is no Q to measure.*Give max_error"):
        quantize_graph(encoder, of_encoder, SCHEME, "gptq", sample(of_encoder), budget=Budget(max_q_drop=0.1))
