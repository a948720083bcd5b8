"""Real models for TensorRT: engines of three SMs with every attention fused, and the lowered graphs' numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import accel
from accel.bundle import Bundle
from accel.engines import open_session
from accel.engines.session import SessionOptions, StepInputs
from accel.graph.evaluation.sessions import PaddedDecoder, onnxruntime_run
from accel.store import EngineStore
from accel.variants import add_variant

pytest.importorskip("tensorrt_rtx")
SMS = ["sm86", "sm89", "sm120"]
LIMIT = 2e-3
TEXTS = (
    "The capital of France is Paris, a city of two million people on the river Seine.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Dear Sir or Madam, I am writing to you about the order that I placed last week and that has not arrived yet.",
    "Once upon a time there was a small village at the foot of a mountain, where nobody had ever seen the sea.",
)
MakeOnce = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(scope="module")
def variants(made_once: MakeOnce, minilm_bundle: Path, smollm2_bundle: Path) -> dict[str, Path]:
    """Copies of both bundles with fp16 and fp32 graphs for TensorRT."""

    def make(source: Path) -> Callable[[Path], Any]:
        def fill(out: Path) -> None:
            shutil.copytree(source, out)
            for variant in ("fp16", "fp32"):
                add_variant(out, variant)

        return fill

    sources = {"minilm": minilm_bundle, "smollm2": smollm2_bundle}
    return {name: made_once(f"{name}_variants", make(source)) for name, source in sources.items()}


@pytest.mark.parametrize("name,layers", [("minilm", 6), ("smollm2", 30)])
def test_engines_of_three_sms(name: str, layers: int, variants: dict[str, Path], tmp_path: Path) -> None:
    """In a process of their own, as a person builds them: its memory is the build's."""
    options = ["--capacity", "256", "--max-batch", "4"] if name == "smollm2" else []
    command = [sys.executable, "-m", "accel", "build", variants[name], "--target", "rtx", "--sm", *SMS, "--json"]
    command += ["--precision", "fp16", "--store", tmp_path, *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(accel.__file__).parents[1])}
    for built in (True, False):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        reports = json.loads(done.stdout)["engines"]
        assert [(report["sm"], report["built"]) for report in reports] == [([sm], built) for sm in SMS]
        for facts in (report["facts"] for report in reports):
            assert facts["fused_attention"] == layers
            assert facts["layers"].get("kv_cache_update", 0) == (2 * layers if options else 0)
            assert facts["layers"]["attention_input"] == layers
            assert facts["proof"]["rows"] > 100 and "FAILED" not in facts["proof"]["table"]
            assert facts["peak_rss_bytes"] <= 350e6 + 2 * facts["weight_bytes"], facts["peak_rss_bytes"]
    assert [entry.problem for entry in EngineStore(tmp_path).verify()] == [None] * 3


def test_engines_of_a_sliding_window(bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bundle_of("gemma3_text"), tmp_path / "bundle")
    reports = accel.build(tmp_path / "bundle", "rtx", SMS, capacity=64, max_batch=2, store=tmp_path / "store")
    assert [report.facts["fused_attention"] for report in reports] == [3, 3, 3]


def run_of(bundle: Path, variant: str) -> Any:
    opened = Bundle.open(bundle)
    return onnxruntime_run(opened.file(opened.graph(variant, "tensorrt").file))


def test_minilm_in_fp16(variants: dict[str, Path]) -> None:
    """The fp16 graph on ONNX Runtime against the fp32 engine."""
    rng = np.random.default_rng(0)
    lengths = np.array([64, 17, 3, 40])
    real = np.arange(64) < lengths[:, None]
    ids = np.where(real, rng.integers(1000, 30000, real.shape), 0)
    feeds = {"input_ids": ids, "attention_mask": real.astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    found = run_of(variants["minilm"], "fp16")(feeds)["last_hidden_state"][real]
    with accel.load(variants["minilm"], engine="ort-cpu", variant="fp32") as encoder:
        expected = encoder(**feeds).last_hidden_state[real]  # type: ignore[operator]
    assert np.abs(found - expected).max() / np.abs(expected).max() <= LIMIT


def prompt(ids: NDArray[np.int64]) -> StepInputs:
    length, past = np.array([len(ids)], np.int32), np.zeros(1, np.int32)
    return StepInputs(ids, np.arange(len(ids)), length, past, np.arange(len(ids)))


def test_smollm2_in_fp16(variants: dict[str, Path]) -> None:
    """On real text. Rounding the weights alone moves single rows by more than the limit, so the median counts."""
    opened = Bundle.open(variants["smollm2"])
    run, arch = run_of(variants["smollm2"], "fp16"), opened.manifest.arch
    with accel.load(variants["smollm2"], engine="ort-cpu", variant="fp32") as decoder:
        rows = [np.array(decoder.tokenizer.encode(text)) for text in TEXTS]  # type: ignore[union-attr]
    reference: Any = open_session(opened, engine="ort-cpu", options=SessionOptions(capacity=64, max_batch=1)).session
    errors, same, total = [], 0, 0
    for ids in rows:
        expected = reference.step(prompt(ids)).copy()
        found = PaddedDecoder(run, arch, 1, 64, ir.DataType.FLOAT16).step(prompt(ids))
        errors += list(np.abs(found - expected).max(-1) / np.abs(expected).max())
        same, total = same + int((found.argmax(-1) == expected.argmax(-1)).sum()), total + len(ids)
    reference.close()
    assert np.median(errors) <= LIMIT and max(errors) <= 10 * LIMIT, (np.median(errors), max(errors))
    assert same == total


def test_smollm2_greedy_tokens_in_fp32(variants: dict[str, Path]) -> None:
    """32 tokens of the fp32 graph equal the fp32 engine's, through the same slot loop."""
    from accel.runtime.sampling import Sampler, SamplingParams
    from accel.runtime.sequence import Sequence
    from accel.runtime.slots import SlotLoop

    opened = Bundle.open(variants["smollm2"])
    arch = opened.manifest.arch
    with accel.load(variants["smollm2"], engine="ort-cpu", variant="fp32") as decoder:
        ids = np.array(decoder.tokenizer.encode(TEXTS[0]))  # type: ignore[union-attr]
        expected = decoder.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=[]).ids  # type: ignore[union-attr]
    session = PaddedDecoder(run_of(variants["smollm2"], "fp32"), arch, 2, 64)
    loop = SlotLoop(session)
    sequences = [Sequence(ids, Sampler(SamplingParams(), arch.vocab_size), max_new_tokens=32) for _ in range(2)]
    for sequence in sequences:
        loop.submit(sequence)
    while loop.has_work:
        loop.step()
    assert [sequence.new_ids for sequence in sequences] == [expected, expected]


def test_killed_builds_leave_a_good_store(bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    """SIGKILL at twenty moments of a build: what the store holds is always whole, and the next run succeeds."""
    shutil.copytree(bundle_of("llama"), tmp_path / "bundle")
    add_variant(tmp_path / "bundle", "fp16", check=False)
    store, sms = tmp_path / "store", ["sm86", "sm89", "sm120"]
    command = [sys.executable, "-m", "accel", "build", tmp_path / "bundle", "--target", "rtx", "--capacity", "32"]
    command += ["--sm", *sms, "--store", store, "--json"]
    root = Path(accel.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    other = [*command[:-2], tmp_path / "other", "--json"]
    started = time.monotonic()
    whole = subprocess.run(other, env=environment, capture_output=True)
    seconds, chance = time.monotonic() - started, random.Random(0)
    assert whole.returncode == 0, whole.stderr
    for _ in range(20):
        build = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.1, 1.0) * seconds)
        build.send_signal(signal.SIGKILL)
        build.wait()
        served = [entry for entry in EngineStore(store).verify() if entry.manifest is not None]
        assert [entry.problem for entry in served] == [None] * len(served)
        if len(served) == len(sms):
            shutil.rmtree(store)
    last = subprocess.run(command, env=environment, capture_output=True)
    assert last.returncode == 0, last.stderr
    assert len(json.loads(last.stdout)["engines"]) == len(sms)
    assert [entry.problem for entry in EngineStore(store).verify()] == [None] * len(sms)
