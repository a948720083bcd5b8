"""The cuda engine with caches in int8 and 8-bit floats, on Triton's interpreter: steps, rows, sizes, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.compress import kv_scales
from accel.engines import open_session
from accel.engines.cuda.device import INTERPRETED, Device
from accel.engines.cuda.program import weight_bytes
from accel.engines.cuda.registry import open_cuda, pick_precision, probe
from accel.engines.kv_cache import bytes_per_token, cache_item_bytes, rounded_cache
from accel.engines.session import SessionOptions
from accel.errors import EngineUnavailableError, InputError, ParityError
from accel.graph.evaluation.sessions import PackedDecoder
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.graph.lowering.cuda import lower
from accel.graph.save import load_canonical
from accel.kv_quantization import KvQuantization
from accel.scheme import gpu_type
from accel.variants import add_variant
from tests.engines.cuda.steps import CAPACITY, ROWS, inputs

TYPES = {
    "fp16+kv8": torch.float16, "bf16+kv8": torch.bfloat16, "w4g32+kv8": torch.float16, "fp16+kvfp8": torch.float16,
}  # fmt: skip
LIMITS = {torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of the largest logit: other sums, and so here and there a tie
MOVED = {torch.float16: 0.05, torch.bfloat16: 0.6}  # steps of an integer, on average: what the type itself rounds
STEPS = (
    inputs({0: [5, 6, 7, 8], 2: [9, 10]}, {}, wanted=[0, 2, 3, 5]),
    inputs({0: [11], 2: [12]}, {0: 4, 2: 2}),
    inputs({0: [13]}, {0: 5}),
    inputs({0: [14], 1: [15, 16, 17], 2: [18]}, {0: 6, 2: 3}),
)
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="there is a GPU: tests/parity/test_gpu_engines.py runs it"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes on masked lanes
]


@pytest.fixture(scope="module", params=TYPES)
def added(request: pytest.FixtureRequest, tiny_decoder_bundle: Path, tmp_path_factory: Any) -> tuple[Bundle, str]:
    folder = shutil.copytree(tiny_decoder_bundle, tmp_path_factory.mktemp("integer") / "decoder")
    integers: dict[str, Any] = {"algorithm": "rtn"} if request.param.startswith("w") else {}
    return add_variant(folder, request.param, target="cuda", **integers), request.param


@pytest.fixture
def session(added: tuple[Bundle, str]) -> Any:
    bundle, variant = added
    options = SessionOptions(capacity=CAPACITY, max_batch=ROWS)
    made: Any = open_cuda(bundle, variant, options)
    assert made._executor.program.dtype == TYPES[variant]
    yield made
    made.close()


def evaluated(bundle: Bundle, variant: str) -> PackedDecoder:
    model = ir.load(bundle.file(bundle.graph(variant, "cuda").file))
    kind = ir.DataType.FLOAT8E4M3FN if holds_floats(variant) else ir.DataType.INT8
    return PackedDecoder(TorchGraph(model).run, bundle.manifest.arch, ROWS, CAPACITY, kind)


def holds_floats(variant: str) -> bool:
    return variant.endswith("fp8")


def compare(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, atol=LIMITS[dtype] * np.abs(theirs).max(), rtol=0)


def test_steps_and_copied_rows(session: Any, added: tuple[Bundle, str]) -> None:
    reference, dtype = evaluated(*added), TYPES[added[1]]
    for step in STEPS:
        compare(session.step(step), reference.step(step), dtype)
    kind = torch.float8_e4m3fn if holds_floats(added[1]) else torch.int8
    assert all(cache.dtype == kind for pair in session._caches for cache in pair)
    held = reference.read_row(0, 7)
    for index, pair in enumerate(session._caches):
        for part, cache in zip(("key", "value"), pair):
            theirs = held[f"{index}.{part}"].astype(np.float32)
            step = np.maximum(np.abs(theirs), 2.0**-6) / 8 if holds_floats(added[1]) else 1
            assert (np.abs(cache[0, :, :7].float().numpy() - theirs) / step).mean() < MOVED[dtype]
    for each in (session, reference):
        each.copy_row(0, 1, 5)
    copied, source = (session._caches[0][0][row, :, :5].float() for row in (1, 0))
    assert torch.equal(copied, source)
    step = inputs({1: [19]}, {1: 5})
    compare(session.step(step), reference.step(step), dtype)


def test_greedy_steps_ahead(session: Any, added: tuple[Bundle, str]) -> None:
    reference, past = evaluated(*added), 3
    token = session.greedy(inputs({0: [5, 6, 7]}, {}))
    reference.step(inputs({0: [5, 6, 7]}, {}))
    for _ in range(4):
        step = inputs({0: token.tokens.tolist()}, {0: past})
        expected = reference.step(step)[0]
        token, past = session.greedy(step), past + 1
        limit = LIMITS[TYPES[added[1]]] * np.abs(expected).max()
        assert abs(float(token.logits[0]) - expected[token.tokens[0]]) <= limit
        assert expected.max() - expected[token.tokens[0]] <= 2 * limit


def test_what_the_bundle_says(added: tuple[Bundle, str]) -> None:
    bundle, variant = added
    parity, entry = bundle.manifest.parity[f"{variant}/cuda"], bundle.graph(variant, "cuda")
    floats, numbers = holds_floats(variant), parity.reference.removeprefix("PyTorch on the same ")
    assert numbers == ("8-bit floats" if floats else "integers") and 0 < parity.max_rel_error < parity.limit
    assert cache_item_bytes(bundle.manifest.arch, entry) == 1
    assert rounded_cache(bundle, variant) == ("fp8" if floats else "int8")
    assert "fp32.weights" not in bundle.weights(variant, "cuda")
    assert gpu_type(variant, bundle.variant(variant).dtype) == str(TYPES[variant]).removeprefix("torch.")
    assert pick_precision(bundle, variant) == variant and pick_precision(bundle, "auto") is None
    (attention,) = (report for report in entry.passes if report.name == "attention")
    assert attention.fused["fp8_cache" if floats else "int8_cache"] == len(bundle.manifest.arch.layers)


def test_a_byte_per_number(added: tuple[Bundle, str], session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the time goes, and how many positions fit."""
    bundle, variant = added
    arch = bundle.manifest.arch
    _, token = session.operator_times(rows=1, prompt=4, past=20)
    attention = next(operator for operator in token.operators if operator.name == "CachedAttention")
    cached, layer = 21 * bytes_per_token(arch, 1), arch.layers[0]
    assert cached <= attention.bytes < cached + len(arch.layers) * 8 * layer.heads * layer.head_dim * 3
    weights = weight_bytes(bundle.file(bundle.graph(variant, "cuda").file))
    room = 100 * ROWS * bytes_per_token(arch, 1) * 2  # half of what is free is the default's
    monkeypatch.setattr(Device, "free_memory", lambda _: weights + int(room / 0.9) + 9)
    opened: Any = open_cuda(bundle, variant, SessionOptions(max_batch=ROWS))
    assert opened.capacity == 100
    opened.close()


def test_engines_say_who_runs_it(added: tuple[Bundle, str]) -> None:
    bundle, variant = added
    kind = "fp8" if holds_floats(variant) else "int8"
    with pytest.raises(EngineUnavailableError, match=rf"ort-cuda: it has no {kind} KV cache; .* runs on cuda[) ]"):
        open_session(bundle, engine="ort-cuda", variant=variant)
    said = "it has no fp8 KV cache" if kind == "fp8" else "no ort-cpu graph for variant .*its graphs are for cuda"
    with pytest.raises(EngineUnavailableError, match=f"ort-cpu: .*{said}"):
        open_session(bundle, engine="ort-cpu", variant=variant)


def test_beside_the_graph_of_a_cpu(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """Each has its own types of activations under one name, and its own engine."""
    folder, name = Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder")), "w4g32+kv8"
    for target in ("ort-cpu", "cuda"):
        bundle = add_variant(folder, name, target=target, algorithm="rtn", measure=False, check=False)
    assert set(bundle.variant(name).graphs) == {"ort-cpu", "cuda"}
    with accel.load(folder, variant=name) as model:
        assert model.engine.name == "ort-cpu" and model.generate("hello", max_new_tokens=3).ids
    with pytest.raises(EngineUnavailableError, match=r"torch: it has no int8 KV cache; .* runs on cuda, ort-cpu"):
        open_session(bundle, engine="torch", variant=name)


def test_wrong_scales_are_noticed(tiny_decoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.graph.lowering.cuda import attention

    folder = Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder"))
    right = attention.make_constant

    def spoiled(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
        return right(graph, name, data / 16 if "scales" in name else data)

    monkeypatch.setattr(attention, "make_constant", spoiled)
    with pytest.raises(ParityError, match="the same integers"):
        add_variant(folder, "fp16+kv8", target="cuda")
    assert "fp16+kv8" not in Bundle.open(folder).manifest.variants


def test_scales_without_onnx_runtime(added: tuple[Bundle, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where GPUs are, its wheel may lack the CPU's kernels: the same scales from PyTorch."""
    bundle = added[0]
    canonical = load_canonical(bundle.file("canonical.onnx"))
    samples = [np.random.default_rng(seed).integers(2, 258, 40) for seed in range(8)]
    expected = kv_scales.calibrate_cache(bundle, canonical, samples, 8)

    def missing(*_: Any, **__: Any) -> Any:
        raise EngineUnavailableError("no engine can run this bundle here")

    monkeypatch.setattr(kv_scales, "open_session", missing)
    found = kv_scales.calibrate_cache(bundle, canonical, samples, 8)
    for ours, theirs in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_scales_of_whole_tensors(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """One scale of a calibration stands in every channel's place; what does not fit is refused."""
    bundle = Bundle.open(tiny_decoder_bundle)
    arch, canonical = bundle.manifest.arch, load_canonical(bundle.file("canonical.onnx"))
    count, layer = len(arch.layers), arch.layers[0]
    shared = tuple(np.full(1, 0.25, np.float32) for _ in range(count))
    model, _ = lower(canonical, arch, 64, ir.DataType.FLOAT16, KvQuantization(8, shared, shared))
    node = next(node for node in model.graph if node.op_type == "CachedAttention")
    for value in node.inputs[9:]:
        assert value is not None and value.const_value is not None and value.dtype == ir.DataType.FLOAT
        scales = value.const_value.numpy()
        assert scales.shape == (layer.kv_heads, layer.head_dim) and (scales == 0.25).all()
    assert ir.DataType(node.attributes["dtype"].as_int()) == ir.DataType.FLOAT16
    kinds = {value.dtype for value in (*model.graph.inputs, *model.graph.outputs) if "present" in (value.name or "")}
    assert kinds == {ir.DataType.INT8}
    with pytest.raises(InputError, match="caches are floats or int8, not int4"):
        lower(canonical, arch, 64, ir.DataType.FLOAT16, KvQuantization(4, shared, shared))
    with pytest.raises(InputError, match="scales of 1 layers for a model of"):
        lower(canonical, arch, 64, ir.DataType.FLOAT16, KvQuantization(8, shared[:1], shared[:1]))


def test_a_gpu_that_has_no_8_bit_floats(added: tuple[Bundle, str], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, variant = added
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, said in (((8, 6), "the GPU is sm86; caches of 8-bit floats need sm89 or later"), ((8, 9), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=found: found)
        assert probe(bundle, variant) == (said if holds_floats(variant) else None)


def test_an_encoder_has_no_cache(minilm_bundle: Path) -> None:
    bundle = Bundle.open(minilm_bundle)
    canonical = load_canonical(bundle.file(bundle.graph("fp32", "canonical").file))
    with pytest.raises(InputError, match="an encoder has no KV cache"):
        lower(canonical, bundle.manifest.arch, 64, ir.DataType.FLOAT, KvQuantization(8, (), ()))


def test_a_graph_of_floats_is_as_it_was(tiny_decoder_bundle: Path) -> None:
    bundle = Bundle.open(tiny_decoder_bundle)
    arch, canonical = bundle.manifest.arch, load_canonical(bundle.file("canonical.onnx"))
    model, _ = lower(canonical, arch, 64, ir.DataType.FLOAT16)
    nodes = [node for node in model.graph if node.op_type == "CachedAttention"]
    assert all(len(node.inputs) == 9 and "dtype" not in node.attributes for node in nodes)
    pasts = {value.dtype for value in model.graph.inputs if (value.name or "").startswith("past.")}
    assert pasts == {ir.DataType.FLOAT16}
