"""Every family's last layer is for the tokens alone whose logits are wanted, behind every target's attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.graph.lowering import cuda, ort_cpu, ort_cuda, tensorrt
from accel.graph.lowering.wanted_tokens import choose_tokens_early
from accel.graph.save import load_canonical
from tests.parity.families import DECODERS


@pytest.mark.parametrize("name", DECODERS)
def test_what_follows_the_last_attention_is_for_wanted_tokens(name: str, bundle_of: Callable[[str], Path]) -> None:
    bundle = Bundle.open(bundle_of(name))
    arch, model = bundle.manifest.arch, load_canonical(bundle.file(bundle.graph("fp32", "canonical").file))
    lowered = [target.lower(model, arch, arch.max_positions) for target in (cuda, ort_cpu, ort_cuda, tensorrt)]
    nodes = list(model.graph)
    last = max(place for place, node in enumerate(nodes) if node.op_type == "CachedAttention")
    products = [node for node in nodes[last:] if node.op_type == "Linear"]
    assert len(products) >= 4, "behind attention, two of a feed-forward, and the head"
    moved = choose_tokens_early(model)
    assert moved >= len(products) and all(node.outputs[0].shape[1] == "R" for node in products)  # type: ignore[index]
    for _, reports in lowered:
        assert next(report.fused for report in reports if report.name == "tokens") == {"tokens": moved}
