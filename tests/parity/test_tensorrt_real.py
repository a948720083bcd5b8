"""What TensorRT engines must reach with real weights: built for three SMs, proved, fused, and their graph's numbers.

No engine runs here: there is no GPU. ONNX Runtime computes the graph that each engine is built from.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import accel
from accel.bundle import Bundle
from accel.engine_build import EngineReport, build
from accel.engines.session import StepInputs
from accel.graph.evaluation.sessions import PaddedDecoder, onnxruntime_run
from accel.store import EngineStore
from accel.variants import add_variant

pytest.importorskip("tensorrt_rtx")
ROOT = Path(__file__).parents[2]
SMS = ("sm86", "sm89", "sm120")
FP16 = 2e-3  # of the largest value
GREEDY = 32
KILLS = 20
MEMORY = 3.2  # times the weights, above what the process holds before
SENTENCES = ["The cat sits on the mat.", "A cat is resting on a rug.", "Interest rates rose again this quarter."]
TEXTS = [
    "The capital of France is Paris, which lies on the river Seine.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Once upon a time, in a village by the sea, there lived an old fisherman who told stories to the children.",
    "Water boils at 100 degrees Celsius at sea level, but on a mountain the pressure is lower.",
]
PROMPTS = ["The capital of France is", "Once upon a time, in a village by the sea,"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_CACHE", str(made / "cache"))
        yield made
    shutil.rmtree(made)  # a gigabyte of engines


@pytest.fixture(scope="module")
def minilm(folder: Path, minilm_bundle: Path) -> Bundle:
    return add_variant(shutil.copytree(minilm_bundle, folder / "minilm"), "fp16")


@pytest.fixture(scope="module")
def smollm2(folder: Path, smollm2_bundle: Path) -> Bundle:
    bundle = add_variant(
        shutil.copytree(smollm2_bundle, folder / "smollm2"), "fp16", check=False
    )  # it is compared below
    return add_variant(bundle, "fp32", check=False)


def check_engines(bundle: Bundle, reports: list[EngineReport], profiles: list[str]) -> None:
    layers = len(bundle.manifest.arch.layers)
    assert [report.sm for report in reports] == [(sm,) for sm in SMS] and all(report.built for report in reports)
    for report in reports:
        facts = report.facts
        assert report.variant == "fp16" and facts["warnings"] == [] and facts["profile_order"] == profiles
        assert facts["fused_attention"] == layers
        updates = 2 * layers if bundle.manifest.arch.kind == "decoder" else 0
        assert facts["layers"].get("kv_cache_update", 0) == updates
        assert facts["proof"]["rows"] > 3 * layers and "FAILED" not in facts["proof"]["table"].upper()
        assert report.size > facts["weight_bytes"] * 0.9


def test_minilm_engines(minilm: Bundle, folder: Path) -> None:
    check_engines(minilm, build(minilm, "rtx", SMS, precision="fp16", store=folder / "store"), ["encode"])


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_sliding_window_engines(name: str, bundle_of: Callable[[str], Path], folder: Path) -> None:
    bundle = add_variant(shutil.copytree(bundle_of(name), folder / name), "fp16", check=False)
    assert any(layer.window for layer in bundle.manifest.arch.layers)
    reports = build(bundle, "rtx", SMS, precision="fp16", capacity=64, max_batch=2, store=folder / "store")
    check_engines(bundle, reports, ["prefill", "decode"])


@pytest.mark.slow
def test_smollm2_engines(smollm2: Bundle, folder: Path) -> None:
    asked: dict[str, Any] = {"precision": "fp16", "capacity": 512, "max_batch": 4, "store": folder / "store"}
    check_engines(smollm2, build(smollm2, "rtx", SMS, **asked), ["prefill", "decode"])
    assert not any(report.built for report in build(smollm2, "rtx", SMS, **asked))
    shutil.rmtree(folder / "store")


BUILD = """
import json, sys
from pathlib import Path
import accel
from accel import engine_build
from accel.builder import build as building
from accel.bundle import Bundle
from accel.engines.tensorrt.adapter import load_flavour
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
bundle = Bundle.open(sys.argv[1])
load_flavour("rtx")
before = resident()
(report,) = engine_build.build(bundle, "rtx", "sm86", precision="fp16", capacity=256, max_batch=2, store=sys.argv[2])
print(json.dumps({"before": before, "peak": report.facts["peak_rss_bytes"], "weights": report.facts["weight_bytes"]}))
"""


@pytest.mark.slow
def test_memory_of_a_build(smollm2: Bundle, folder: Path, record_property: Callable[[str, object], None]) -> None:
    command = [sys.executable, "-c", BUILD, str(smollm2.path), str(folder / "memory")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    shutil.rmtree(folder / "memory")
    measured = json.loads(done.stdout)
    ratio = (measured["peak"] - measured["before"]) / measured["weights"]
    record_property("memory", measured)
    print(f"a build of {measured['weights'] / 1e6:.0f} MB of weights took {ratio:.2f} times as much: {measured}")
    assert measured["weights"] > 250e6 and 0.5 < ratio <= MEMORY


def relative(found: NDArray, exact: NDArray) -> NDArray[np.float64]:
    """Each row's largest error, as a part of its largest value."""
    return np.abs(found.astype(np.float64) - exact).max(-1) / np.abs(exact).max(-1)


def test_minilm_in_fp16(minilm: Bundle, record_property: Callable[[str, object], None]) -> None:
    run = onnxruntime_run(minilm.file(minilm.graph("fp16", "tensorrt").file))
    with accel.load(minilm.path, engine="ort-cpu", variant="fp32") as encoder:
        encoded = [item.ids for item in encoder.tokenizer.encode_batch(SENTENCES)]
        width = max(len(ids) for ids in encoded)
        ids = np.array([list(ids) + [0] * (width - len(ids)) for ids in encoded])
        mask = np.array([[1] * len(ids) + [0] * (width - len(ids)) for ids in encoded])
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        exact = encoder(**feeds)["last_hidden_state"][mask == 1]
        found = run(feeds)["last_hidden_state"][mask == 1]
    worst = float(np.abs(found - exact).max() / np.abs(exact).max())
    record_property("error", worst)
    print(f"MiniLM in fp16: {worst:.1e} of the largest value")
    assert found.dtype == np.float32 and 1e-6 < worst <= FP16


def decoder_of(bundle: Bundle, variant: str, capacity: int) -> PaddedDecoder:
    """The lowered graph on ONNX Runtime, one row."""
    dtype = ir.DataType.FLOAT16 if variant == "fp16" else ir.DataType.FLOAT
    run = onnxruntime_run(bundle.file(bundle.graph(variant, "tensorrt").file))
    return PaddedDecoder(run, bundle.manifest.arch, 1, capacity, dtype)


def step(session: Any, ids: NDArray, past: int, wanted: NDArray) -> NDArray[np.float32]:
    lengths = np.zeros(session.max_batch, np.int32), np.zeros(session.max_batch, np.int32)
    lengths[0][0], lengths[1][0] = len(ids), past
    return np.array(session.step(StepInputs(ids, np.arange(past, past + len(ids)), *lengths, wanted)))


@pytest.mark.slow
def test_smollm2_in_fp16(smollm2: Bundle, record_property: Callable[[str, object], None]) -> None:
    """Half of the tokens of real text stay within the limit; rounding the weights alone costs the worst one more."""
    errors, decoder = [], decoder_of(smollm2, "fp16", 64)
    with accel.load(smollm2.path, engine="ort-cpu", variant="fp32", capacity=64, max_batch=1) as model:
        for text in TEXTS:
            ids = np.array(model.tokenizer.encode(text))
            exact = step(model._session, ids, 0, np.arange(len(ids)))
            errors.append(relative(step(decoder, ids, 0, np.arange(len(ids))), exact))
    rows = np.concatenate(errors)
    record_property("errors", [float(error.max()) for error in errors])
    print(f"SmolLM2 in fp16: median {np.median(rows):.1e}, largest {[f'{error.max():.1e}' for error in errors]}")
    assert 1e-5 < np.median(rows) <= FP16 and rows.max() < 2e-2


@pytest.mark.slow
def test_smollm2_greedy_tokens(smollm2: Bundle) -> None:
    """A prompt in one run and one token at a time: what the fp32 engine generates."""
    with accel.load(smollm2.path, engine="ort-cpu", variant="fp32", capacity=64, max_batch=1) as model:
        encoded = [np.array(model.tokenizer.encode(prompt)) for prompt in PROMPTS]
        expected = [
            model.generate(prompt, max_new_tokens=GREEDY, do_sample=False, eos_token_id=[]).ids for prompt in PROMPTS
        ]
    session = decoder_of(smollm2, "fp32", 64)
    for prompt, tokens in zip(encoded, expected, strict=True):
        ids, past, found = prompt, 0, list[int]()
        while len(found) < GREEDY:
            logits = step(session, ids, past, np.array([len(ids) - 1]))
            past += len(ids)
            found.append(int(logits[-1].argmax()))
            ids = np.array(found[-1:])
        assert found == list(tokens)


def start(bundle: Path, store: Path, rows: int) -> subprocess.Popen[str]:
    asked = ["--target", "rtx", "--sm", "sm86", "--capacity", "64", "--max-batch", str(rows), "--store", str(store)]
    command = [sys.executable, "-m", "accel", "build", str(bundle), *asked, "--precision", "fp16", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_killed_builds(tiny_decoder_bundle: Path, folder: Path) -> None:
    """Twenty moments of the command's life, each of another engine: whatever the store shows is whole."""
    bundle = add_variant(shutil.copytree(tiny_decoder_bundle, folder / "killed"), "fp16").path
    store, rng = folder / "killed_store", random.Random(0)
    began = time.monotonic()
    process = start(bundle, store, 1)
    assert json.loads(process.communicate()[0])["engines"][0]["built"] and process.returncode == 0
    seconds, killed = time.monotonic() - began, 0
    for number in range(KILLS):
        process = start(bundle, store, 2 + number)
        time.sleep(rng.uniform(0.3, 1) * seconds)  # before that Python only starts
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        opened = EngineStore(store)
        entries = opened.verify()
        assert [entry.problem for entry in entries if entry.problem] == [] and entries
        for entry in entries:
            assert entry.manifest is not None
            engine = opened.get(entry.manifest.key)
            assert engine is not None and len(engine.plan()) == entry.manifest.size
            engine.close()
        Bundle.open(bundle, verify=True)
    assert killed >= KILLS // 2
    (report,) = build(bundle, "rtx", "sm86", capacity=64, max_batch=2, precision="fp16", store=store)
    assert report.max_batch == 2
    process = start(bundle, store, 1 + KILLS)
    engine = json.loads(process.communicate()[0])["engines"][0]
    assert process.returncode == 0 and engine["facts"]["fused_attention"] == 2
    EngineStore(store).prune()
    names = [path.name for path in store.rglob("*") if path.is_file()]
    assert not [name for name in names if ".tmp" in name], "what killed builds left is cleared away"
