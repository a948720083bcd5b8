"""The engines of NVIDIA GPUs on a GPU, every family: floats beside PyTorch in fp32, integers beside what they mean.

Nothing here needs ONNX Runtime 1.32, which cannot be installed beside onnxruntime-gpu.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

import accel
from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.cuda.device import INTERPRETED
from accel.engines.session import SessionOptions
from accel.graph.evaluation.torch_graph import TorchGraph
from accel.machine import has_nvidia_device
from accel.scheme import parse_scheme
from accel.spec import OUTPUT_NAMES
from accel.variant_targets import find_target
from accel.variants import LIMITS, add_variant
from tests.engines.cuda.steps import CASES, GREEDY, HOT, MIXED, WithoutSampling, generate
from tests.engines.cuda.ways import drawn_ways
from tests.engines.ort_cuda.gpu import needs_gpu as needs_onnxruntime
from tests.parity.comparison import COURSES, LENGTHS, draw_rows, flatten_real, run_course
from tests.parity.families import ALL, DECODERS, ENCODERS, HEADS, build_model

ROWS, CAPACITY = 3, 64
needs_kernels = pytest.mark.skipif(INTERPRETED or not has_nvidia_device(), reason="needs an NVIDIA GPU")
ENGINES = [pytest.param("cuda", marks=needs_kernels), pytest.param("ort-cuda", marks=needs_onnxruntime)]
FLOATS, INTEGERS = ("fp16", "bf16"), ("w4g32", "w8g32")
CACHES = ("fp16+kv8", "bf16+kv8", "w4g32+kv8", "fp16+kvfp8", "w4g32+kvfp8")
BATCHES = ([30, 7, 19], [30, 7, 19], [2, 30, 11], [11, 30, 2], [*range(7, 31)], [*range(7, 31)], [16, 16])
Pair: TypeAlias = tuple[NDArray, NDArray]  # found, expected
CALIBRATION = (90, 100, 110)  # tokens of random passages
__all__ = ["drawn_ways"]  # a fixture
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def exported(made_once: Callable[..., Path]) -> Callable[[str], Path]:
    def get(name: str) -> Path:
        unchecked = {"parity": {"enabled": False}}
        model, task = build_model(name), ALL[name].task
        return made_once(f"unchecked-{name}", lambda out: accel.export(model, out, unchecked, task=task))

    return get


@pytest.mark.parametrize("variant", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_decoder(engine: str, name: str, variant: str, exported: Any, tmp_path: Path, record_property: Any) -> None:
    """Within the precision's limit; greedy tokens wherever the margin exceeds it."""
    bundle = add(exported(name), tmp_path / name, variant, engine)
    found, exact = open_engine(bundle, engine, variant), open_exact(bundle, engine, variant)
    pairs = []
    for steps in COURSES.values():
        ours, theirs = (np.concatenate(run_course(one, draw_rows(), steps)) for one in (found, exact))
        pairs.append((ours, theirs))
        check_tokens(variant, ours, theirs)
    record_property("error", loss_of(pairs)[0])
    if engine == "ort-cuda":
        assert not found.notes, "decode steps are captured"
    found.close()
    exact.close()
    check(bundle, name, variant, pairs)


@needs_kernels
@pytest.mark.parametrize("variant", CACHES)
@pytest.mark.parametrize("name", DECODERS)
def test_rounded_caches(name: str, variant: str, exported: Any, tmp_path: Path, record_property: Any) -> None:
    """Beside the same numbers in PyTorch nearer than these are to what they round, in the same precision."""
    scheme = parse_scheme(variant)
    if scheme.kv_float8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU does not convert 8-bit floats")
    folder = Path(shutil.copytree(exported(name), tmp_path / name))
    integers: dict[str, Any] = {"algorithm": "rtn"} if scheme.quantized else {}
    options: dict[str, Any] = {"target": "cuda", "check": False, "measure": False, **integers}
    floats = {None: scheme.gpu_base, 4: "w4g32"}[scheme.weight_bits]
    add_variant(folder, floats, **options)
    bundle = add_variant(folder, variant, calibration=[row.tolist() for row in draw_rows(CALIBRATION, 11)], **options)
    found, exact = open_engine(bundle, "cuda", scheme.name), open_exact(bundle, "cuda", scheme.name)
    plain, errors, lost = open_engine(bundle, "cuda", floats), [], []
    kind = torch.float8_e4m3fn if scheme.kv_float8 else torch.int8
    assert all(cache.dtype == kind for pair in found._caches for cache in pair)
    for steps in COURSES.values():
        ours, theirs, unrounded = (
            np.concatenate(run_course(one, draw_rows(), steps)) for one in (found, exact, plain)
        )  # fmt: skip
        errors.append(np.sqrt(np.mean((ours - theirs) ** 2)))
        lost.append(np.sqrt(np.mean((unrounded - theirs) ** 2)))
        assert np.isfinite(ours).all()
    for opened in (found, exact, plain):
        opened.close()
    record_property("error", float(max(np.array(errors) / lost)))
    # bf16 rounds a key as coarsely as its integer is: there both lose as much.
    assert max(np.array(errors) / lost) <= (2.0 if scheme.base == "bf16" else 0.7), (errors, lost)


@pytest.mark.parametrize("variant", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("name", [*ENCODERS, *HEADS])
@pytest.mark.parametrize("engine", ENGINES)
def test_encoder(engine: str, name: str, variant: str, exported: Any, tmp_path: Path, record_property: Any) -> None:
    """A shape's first call, its recording, and the recording with other lengths; then many tokens, and full rows."""
    bundle = add(exported(name), tmp_path / name, variant, engine)
    found, exact = open_engine(bundle, engine, variant), open_exact(bundle, engine, variant)
    pairs = []
    for lengths in BATCHES:
        feeds = draw_batch(bundle, lengths, seed=len(pairs))
        names = OUTPUT_NAMES[bundle.manifest.arch.task]
        ours, theirs = (
            flatten_real({key: part[key] for key in names}, feeds) for part in (found.run(feeds), exact.run(feeds))
        )
        pairs.append((ours, theirs))
    record_property("error", loss_of(pairs)[0])
    if engine == "cuda":
        places = found._places
        assert [*places] == [(4, 32, 64), (32, 32, 448), (2, 16, None)], "tokens stand side by side but for the last"
        assert all(place._replay.failure is None for place in places.values())
        recorded = [shape for shape, place in places.items() if place._replay._graph is not None]
        assert recorded == [(4, 32, 64), (32, 32, 448)]
    found.close()
    exact.close()
    check(bundle, name, variant, pairs)


@needs_kernels
@pytest.mark.parametrize("variant", ["fp16", "w4g32"])
@pytest.mark.parametrize("name", DECODERS[:2])
def test_drawn_tokens_are_the_hosts(name: str, variant: str, exported: Any, tmp_path: Path) -> None:
    """A seed's tokens are the same where the device draws and runs ahead as where the host draws from its logits."""
    session = open_engine(add(exported(name), tmp_path / name, variant, "cuda"), "cuda", variant)
    drawn_only = [(HOT, {}), (MIXED, {}), (GREEDY, {}), (MIXED, {}), (HOT, {})]
    for cases, late in ((drawn_only, 1), (CASES, 2), (drawn_only[:1], 0)):
        for _ in range(2):  # as a call, then as a recording
            ours = generate(session, cases, late, least=30)
            assert ours == generate(WithoutSampling(session), cases, late, least=30)
    replays = [place._sampled for place in (*session._decodes.values(), *session._packed.values())]
    assert all(replay.failure is None for replay in replays)
    assert any(replay._graph is not None for replay in replays), "steps with drawn tokens are recorded"
    session.close()


@needs_onnxruntime
@needs_kernels
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("name", DECODERS[:2])
def test_onnxruntimes_drawn_tokens_are_the_hosts(name: str, variant: str, exported: Any, tmp_path: Path) -> None:
    """Kernels draw from logits that ONNX Runtime left on the GPU, captured steps' and prompts' alike."""
    session = open_engine(add(exported(name), tmp_path / name, variant, "ort-cuda"), "ort-cuda", variant)
    assert session.sample is not None and not session.notes
    for cases, late in (([(HOT, {}), (MIXED, {}), (GREEDY, {}), (MIXED, {})], 1), (CASES, 2), ([(HOT, {})], 0)):
        assert generate(session, cases, late, least=30) == generate(WithoutSampling(session), cases, late, least=30)
    session.close()


def add(exported: Path, folder: Path, variant: str, engine: str) -> Bundle:
    """A copy of the bundle with the engine's graph of a variant."""
    shutil.copytree(exported, folder)
    integers: dict[str, Any] = {"algorithm": "rtn", "measure": False} if variant in INTEGERS else {}
    return add_variant(folder, variant, target=engine, check=False, **integers)


def draw_batch(bundle: Bundle, lengths: list[int], seed: int) -> dict[str, NDArray]:
    """Rows of random tokens, as the bundle takes them."""
    feeds = padded(lengths, seed)
    if "token_type_ids" in {spec.name for spec in bundle.graph("fp32", "canonical").inputs}:
        feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
    return feeds


def padded(lengths: list[int], seed: int) -> dict[str, NDArray]:
    """Rows of random tokens, padded on the right."""
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = np.where(real, np.random.default_rng(seed).integers(1, 90, real.shape), 0)
    return {"input_ids": ids, "attention_mask": real.astype(np.int64)}


def open_engine(bundle: Bundle, engine: str, variant: str) -> Any:
    options = SessionOptions(capacity=CAPACITY, max_batch=ROWS) if bundle.manifest.arch.kind == "decoder" else None
    return open_session(bundle, engine=engine, variant=variant, options=options or SessionOptions()).session


def open_exact(bundle: Bundle, engine: str, variant: str) -> Any:
    """PyTorch in fp32; of integers, what PyTorch makes of the same graph in its own precision."""
    scheme = parse_scheme(variant)
    if not scheme.quantized and scheme.kv_bits is None:
        return open_engine(bundle, "torch", "fp32")
    model = ir.load(bundle.file(bundle.graph(variant, engine).file))
    cache = next((value.dtype for value in model.graph.inputs if value.name == "past.0.key"), None)
    run = TorchGraph(model).run
    return find_target(engine).session(run, bundle.manifest.arch, ROWS, CAPACITY, cache or ir.DataType.FLOAT16)


def check(bundle: Bundle, name: str, variant: str, pairs: list[Pair]) -> None:
    """Within the precision's limit; where a model loses more than that, within twice what PyTorch loses there.

    In bf16 many of these do; in fp16 two do on ONNX Runtime. Of integers both sides round: they differ by as much as
    both lose.
    """
    largest, rms = loss_of(pairs)
    if variant in INTEGERS:
        assert largest <= 2 * LIMITS["fp16"]
    elif largest > LIMITS[variant]:
        own = loss_of([*pytorch_pairs(name, variant, OUTPUT_NAMES[bundle.manifest.arch.task])])
        assert largest <= 2 * own[0] and rms <= 2 * own[1], (largest, rms, own)


def check_tokens(variant: str, ours: NDArray, theirs: NDArray) -> None:
    """The best tokens are the same where the second best is farther off than the limit.

    What exceeds the limit, as PyTorch's own results do, may swap tokens that are nearer than twice its error.
    """
    limit = 2 * LIMITS["fp16"] if variant in INTEGERS else LIMITS[variant]
    error, tolerance = np.abs(ours - theirs).max(), limit * np.abs(theirs).max()
    best = np.partition(theirs, -2, axis=-1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > (tolerance if error <= tolerance else 2 * error)
    assert clear.any() or variant == "bf16", "too few tokens are apart"
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


def pytorch_pairs(name: str, variant: str, names: tuple[str, ...]) -> Iterator[Pair]:
    """PyTorch's results in the variant's precision and in fp32, on many inputs: the largest error on a few is luck."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    exact, low = build_model(name), build_model(name).to("cuda", dtype)
    lengths = [[row] for row in LENGTHS] if name in DECODERS else BATCHES
    for seed, batch in enumerate(4 * [*lengths]):
        feeds = padded(batch, seed)
        given = {key: torch.from_numpy(array) for key, array in feeds.items()}
        with torch.no_grad():
            outputs = low(**{key: tensor.cuda() for key, tensor in given.items()}), exact(**given)
        ours, theirs = (
            flatten_real({key: getattr(part, key).float().cpu().numpy() for key in names}, feeds) for part in outputs
        )
        yield ours, theirs


def loss_of(pairs: list[Pair]) -> tuple[float, float]:
    """The largest error relative to the largest value of its pair, and errors' root mean square relative to values'.

    A systematic loss shows in the second one, a wrong value in the first.
    """
    largest, squares = 0.0, []
    for found, expected in pairs:
        assert found.shape == expected.shape and np.isfinite(found).all()
        largest = max(largest, float(np.abs(found - expected).max() / np.abs(expected).max()))
        squares.append(np.mean((found - expected) ** 2) / np.mean(expected**2))
    return largest, float(np.sqrt(np.mean(squares)))
