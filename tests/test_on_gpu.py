"""What a user does on a GPU: warm a bundle up, measure it, load what was the fastest."""

from __future__ import annotations

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import accel
from accel.bench import bench
from accel.cli import main
from accel.engines.choice import MARGIN
from accel.engines.cuda.device import INTERPRETED
from accel.machine import has_nvidia_device
from tests.engines.ort_cuda.gpu import needs_gpu as needs_onnxruntime
from tests.parity.families import ALL, build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not has_nvidia_device(), reason="needs an NVIDIA GPU"),
    needs_onnxruntime,
]
ENGINES = ("cuda", "ort-cuda")
SIZES: dict[str, Any] = {"capacity": 64, "max_batch": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama`` and ``bert``, with fp16 graphs for both engines, and a job that names them."""
    made = tmp_path_factory.mktemp("gpu")
    for name in ("llama", "bert"):
        unchecked = {"parity": {"enabled": False}}
        accel.export(build_model(name), made / name, unchecked, task=ALL[name].task, show_progress=False)
        for target in ENGINES:
            accel.add_variant(made / name, "fp16", target=target, check=False, show_progress=False)
    job = {"bundle": ["llama", "bert"], "target": list(ENGINES), "precision": "fp16", **SIZES}
    (made / "jobs.yaml").write_text(json.dumps({"store": "store", "jobs": [job]}))  # JSON is YAML
    return made


def test_warm_up_measures_and_load_takes_the_fastest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # of a checkout that is not installed
    assert main(["warmup", str(folder / "jobs.yaml")]) == 0
    print(capsys.readouterr().out)
    report = accel.warmup(folder / "jobs.yaml", dry_run=True)
    assert {line.status for line in report.engines} == {"hit"}
    measured = {Path(line.bundle).name: line for line in report.measured}
    assert {line.status for line in measured.values()} == {"hit"}
    for name, options in (("llama", SIZES), ("bert", {})):
        costs = measured[name].engines
        assert {f"{engine} fp16" for engine in ENGINES} <= costs.keys()
        with accel.load(folder / name, device="cuda", store=folder / "store", **options) as model:
            assert costs[f"{model.engine.name} {model.engine.variant}"] <= min(costs.values()) / (1 - MARGIN)
            assert model.engine.why.startswith("measured: ")


def tokens(model: Any) -> list[list[int]]:
    """Greedy ones of batches and prompts of several sizes."""
    prompts = [np.arange(3, 3 + length).tolist() for length in (5, 9, 20, 7, 30, 12)]
    answers = [model.generate(prompts[:count], max_new_tokens=12, eos_token_id=[]) for count in (1, 2, 6) * 2]
    return [one.ids for answer in answers for one in answer]


@pytest.mark.parametrize("other", ENGINES)
def test_two_models_on_one_gpu(
    other: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a thread of its own, from the first calls on, in which kernels are compared and runs recorded."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))  # no contest was held yet

    def vectors(model: Any) -> list[NDArray]:
        made = []
        for rows, width in ((1, 5), (3, 17), (7, 40), (2, 60)) * 3:
            ids = np.random.default_rng(rows).integers(5, 90, (rows, width))
            mask = (np.arange(width) < np.linspace(1, width, rows).astype(int)[:, None]).astype(np.int64)
            made.append(model(input_ids=ids * mask, attention_mask=mask)["last_hidden_state"] * mask[..., None])
        return made

    together = []
    for _ in range(3):
        with (
            accel.load(folder / "llama", engine="cuda", **SIZES) as first,
            accel.load(folder / "bert", engine=other) as second,
            ThreadPoolExecutor(2) as pool,
        ):
            both = pool.submit(tokens, first), pool.submit(vectors, second)
            together.append((both[0].result(300), both[1].result(300)))
            assert first.engine.name == "cuda" and second.engine.name == other, "neither broke"
    with accel.load(folder / "llama", engine="cuda", **SIZES) as model:
        expected_tokens = tokens(model)
    with accel.load(folder / "bert", engine=other) as model:
        expected_vectors = vectors(model)
    for found_tokens, found_vectors in together:
        # Kernels that could not be compared amid the other model's work are compared later, and may round otherwise.
        assert sum(one != other for one, other in zip(found_tokens, expected_tokens, strict=True)) <= 1
        for found, expected in zip(found_vectors, expected_vectors, strict=True):
            assert np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()


def test_decoders_are_loaded_while_others_serve(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime captures as its decoder is loaded; CUDA refuses what others allocate then, and ends the capture."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    loaded = threading.Event()

    def serve(model: Any) -> list[list[list[int]]]:
        found = [tokens(model)]
        while not loaded.is_set():
            found.append(tokens(model))
        return [*found, tokens(model)]

    with ExitStack() as stack:
        models = [stack.enter_context(accel.load(folder / "llama", engine=name, **SIZES)) for name in ENGINES]
        pool = stack.enter_context(ThreadPoolExecutor(len(models)))
        serving = [pool.submit(serve, model) for model in models]
        try:
            for _ in range(4):
                for name in reversed(ENGINES):
                    with accel.load(folder / "llama", engine=name, **SIZES) as late:
                        tokens(late)
                        assert late.engine.name == name, "neither its load nor its run broke"
        finally:
            loaded.set()
        together = [job.result(300) for job in serving]
        assert [model.engine.name for model in models] == [*ENGINES], "none broke"
        alone = [tokens(model) for model in models]  # by another thread than they served
    assert "graphs are off" not in caplog.text
    for served, expected in zip(together, alone, strict=True):
        for found in served:  # see above for the one
            assert sum(one != other for one, other in zip(found, expected, strict=True)) <= 1


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bench_shows_where_the_time_goes(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    sizes: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 8, "shapes": ((1, 8), (2, 16))}
    report = bench(folder / name, device="cuda", rounds=3, compare=False, **sizes)
    assert {f"{engine} fp16" for engine in ENGINES} <= {f"{row.engine} {row.variant}" for row in report.engines}
    assert report.roofline is not None and not report.no_roofline
    shares = report.roofline.shares
    assert len({share.phase for share in shares}) == (4 if name == "llama" else 2), "a decoder's batch too"
    assert all(share.ms > 0 and share.limit_ms > 0 for share in shares if not share.operator)
    assert {share.phase for share in shares if share.operator} == {share.phase for share in shares}
    assert str(report.roofline) in str(report)
