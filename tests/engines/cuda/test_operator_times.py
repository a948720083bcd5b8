"""Where a run's time goes, on Triton's interpreter: what is counted, not how long it takes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from accel_kernels.tiles import LAYER_NORM

from accel.bundle import Bundle
from accel.engines.cuda import values
from accel.engines.cuda.decoder import CudaDecoderSession
from accel.engines.cuda.device import INTERPRETED, open_device
from accel.engines.cuda.encoder import CudaEncoderSession
from accel.engines.cuda.executor import Executor
from accel.engines.kv_cache import CacheShape
from accel.graph.external import write_external
from accel.graph.lowering.cuda import lower
from accel.graph.save import load_canonical, save_graph
from accel.spec import ArchSpec

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/parity/test_gpu_engines.py runs it"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes on masked lanes
]


def lowered(folder: Path, out: Path) -> tuple[Path, ArchSpec]:
    bundle = Bundle.open(folder)
    arch = bundle.manifest.arch
    model, _ = lower(load_canonical(bundle.file(bundle.graph("fp32", "canonical").file)), arch, 64, ir.DataType.FLOAT)
    write_external(model, out / "weights")
    save_graph(model, out / "graph.onnx", (), (), "0")
    return out / "graph.onnx", arch


def test_decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    path, arch = lowered(tiny_decoder_bundle, tmp_path)
    session = CudaDecoderSession(path, arch, "fp32", CacheShape(2, 48), open_device(), torch.float32)
    prompt, token = session.operator_times(rows=1, prompt=8, past=20)
    assert (prompt.name, token.name) == ("prompt 1x8", "token, batch 1")
    layers = len(arch.layers)
    for phase, rows, seen in ((prompt, 8, 4.5), (token, 1, 21)):
        found = {operator.name: operator for operator in phase.operators}
        assert phase.seconds > 0 and all(operator.seconds > 0 for operator in phase.operators)
        assert [o.seconds for o in phase.operators] == sorted((o.seconds for o in phase.operators), reverse=True)
        layer, attention = arch.layers[0], found["CachedAttention"]
        assert attention.count == layers
        assert attention.flops == layers * 4 * rows * layer.heads * layer.head_dim * seen
        head = found[f"Linear {arch.hidden_size} to {arch.vocab_size}"]
        assert head.count == 1 and head.flops == 2 * arch.hidden_size * arch.vocab_size
        assert head.bytes >= 4 * arch.hidden_size * arch.vocab_size
        assert next(o for name, o in found.items() if name.startswith("GatedLinear")).count == layers
    cache = 2 * arch.layers[0].kv_heads * arch.layers[0].head_dim * 4 * 21
    assert next(o for o in token.operators if o.name == "CachedAttention").bytes >= layers * cache
    session.close()


def test_tokens_differ_as_in_requests(
    tiny_decoder_bundle: Path, minilm_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU at its power limit multiplies rows faster that are alike."""
    fed: list[dict[str, torch.Tensor]] = []
    run = Executor.trace
    seen = lambda owner, feeds, *more: fed.append(dict(feeds)) or run(owner, feeds, *more)  # noqa: E731
    monkeypatch.setattr(Executor, "trace", seen)
    for folder in (tiny_decoder_bundle, minilm_bundle):
        (tmp_path / folder.name).mkdir()
        path, arch = lowered(folder, tmp_path / folder.name)
        if arch.kind == "decoder":
            decoder = CudaDecoderSession(path, arch, "fp32", CacheShape(2, 48), open_device(), torch.float32)
            phases = decoder.operator_times(rows=2, prompt=4, past=6)
            gathers = [[o.count for o in phase.operators if o.name == "Gather"] for phase in phases]
            assert gathers == [[2], []], "of a prompt, the last layer's two; a decode step hands them on"
        else:
            CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32).operator_times(rows=2, width=4)
        assert all(feeds["input_ids"].min() >= 0 and feeds["input_ids"].max() < arch.vocab_size for feeds in fed)
    prompt, token, forward = (feeds["input_ids"] for feeds in fed)
    assert [list(ids.shape) for ids in (prompt, token, forward)] == [[8], [2], [2, 4]]
    assert all(len(ids.unique()) == ids.numel() for ids in (prompt, token, forward)), "drawn with one seed"


def test_encoder(minilm_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, arch = lowered(minilm_bundle, tmp_path)
    gathers: list[object] = []
    launch = values.gather
    seen = lambda *given, **named: gathers.append(named.get("norm")) or launch(*given, **named)  # noqa: E731
    monkeypatch.setattr(values, "gather", seen)
    session = CudaEncoderSession(path, arch, "fp32", open_device(), torch.float32)
    phase = session.operator_times(rows=2, width=4)
    found = {operator.name: operator for operator in phase.operators}
    assert found["Attention"].count == len(arch.layers)
    assert found["LayerNormalization"].count == 2 * len(arch.layers) + 1
    assert set(gathers) == {LAYER_NORM}, "one kernel reads, adds and normalizes the embeddings"
    products = [operator for name, operator in found.items() if name.startswith("Linear")]
    assert sum(operator.count for operator in products) == 4 * len(arch.layers), "packed, out, up and down"
    sizes = [operator.name.removeprefix("Linear ").split(" to ") for operator in products]
    weights = sum(int(k) * int(n) * operator.count for (k, n), operator in zip(sizes, products))
    assert sum(operator.flops for operator in products) == 2 * 8 * weights
    session.close()
