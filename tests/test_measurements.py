"""What was measured is kept whole, and holds for nothing but what was measured."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import accel.measurements as measurements
from accel.bundle import Bundle
from accel.errors import StorageError
from accel.machine import gpu_models
from accel.manifest import FileEntry, GraphEntry, Variant
from accel.measurements import Measured, Measurements, current, folders, graph_digest, recall, remember
from tests.engines.tiny_llama import draw_weights, write_bundle

TARGETS = {"ort-cpu": "ort-cpu", "other": "ort-cpu"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("measured") / "bundle", draw_weights())


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ACCEL_STORE", raising=False)
    monkeypatch.delenv("ACCEL_STORE_KEY", raising=False)


def row(bundle: Bundle, cost: float = 8.0, engine: str = "ort-cpu") -> Measured:
    return Measured(engine, "fp32", graph_digest(bundle, "fp32", "ort-cpu") or "", cost, {"forward 1x8": cost})


def keep(bundle: Bundle, *rows: Measured, threads: int | None = 2, store: str | None = None) -> Path:
    return remember(
        bundle, "cpu", threads, rows or [row(bundle)], cost="a mean", rounds=7, date="2026-11-26",
        passed_over={"torch": "it is absent"}, store=store,
    )  # fmt: skip


def test_what_is_kept_is_found_again(bundle: Bundle) -> None:
    assert recall(bundle, "cpu", 2) is None
    path = keep(bundle)
    found = recall(bundle, "cpu", 2)
    assert found is not None and found.rows == (row(bundle),) and found.rounds == 7
    assert found.passed_over == {"torch": "it is absent"} and found.machine["threads"] == "2"
    keep(bundle, row(bundle, 9.0))
    again = recall(bundle, "cpu", 2)
    assert again is not None and again.rows[0].cost == 9.0
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "replaced, nothing left beside it"


def test_other_threads_devices_and_versions_are_others(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(bundle)
    assert recall(bundle, "cpu", 1) is None and recall(bundle, "cuda", 2) is None
    real = measurements.version_of
    with monkeypatch.context() as patch:
        patch.setattr(measurements, "version_of", lambda name: "9.9" if name == "onnxruntime" else real(name))
        assert recall(bundle, "cpu", 2) is None
        keep(bundle, row(bundle, 1.0))
    found = recall(bundle, "cpu", 2)
    assert found is not None and found.rows[0].cost == 8.0, "each version has its own file"
    with monkeypatch.context() as patch:
        cpu = dataclasses.replace(measurements.probe_cpu(), model="another CPU")
        patch.setattr(measurements, "probe_cpu", lambda: cpu)
        assert recall(bundle, "cpu", 2) is None


def test_gpus_of_one_model_are_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(measurements, "gpu_models", lambda: (("L4", "L4"), "580.1"))
    found = measurements.machine_identity("cuda", None)
    assert (found["gpus"], found["driver"]) == ("L4", "580.1") and "visible" not in found
    monkeypatch.setattr(measurements, "gpu_models", lambda: (("A100", "L4"), "580.1"))
    assert measurements.machine_identity("cuda", None)["visible"] == "3"


def test_gpus_are_read_from_the_drivers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\n")
    for number, model in enumerate(("NVIDIA L4", "NVIDIA H200")):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        (tmp_path / "gpus" / str(number) / "information").write_text(f"Model: \t\t {model}\nIRQ:   1\n")
    assert gpu_models(tmp_path) == (("NVIDIA H200", "NVIDIA L4"), "580.95.05")
    monkeypatch.setattr("accel.machine.probe_gpus", lambda: ())
    assert gpu_models(tmp_path / "nothing") == ((), "")


def with_variant(bundle: Bundle, name: str, sha256: str) -> Bundle:
    """The bundle with one more variant, or with other content of that variant's graph."""
    entry = GraphEntry(f"{name}.onnx", 24, (), (), (), weights=())
    manifest = dataclasses.replace(
        bundle.manifest,
        variants={**bundle.manifest.variants, name: Variant("bfloat16", (), {"ort-cpu": entry})},
        files={**bundle.manifest.files, f"{name}.onnx": FileEntry(1, sha256)},
    )
    return Bundle(bundle.path, manifest)


def test_a_row_holds_for_the_graph_it_measured(bundle: Bundle) -> None:
    larger = with_variant(bundle, "bf16", "a" * 64)
    fast = Measured("ort-cpu", "bf16", graph_digest(larger, "bf16", "ort-cpu") or "", 4.0, {})
    keep(larger, row(larger), fast)

    def engines_of(asked: Bundle, targets: dict[str, str] = TARGETS) -> list[str]:
        found = recall(asked, "cpu", 2)
        assert found is not None
        found = current(found, asked, targets)
        return [] if found is None else [row.variant for row in found.rows]

    assert engines_of(larger) == ["fp32", "bf16"]
    assert engines_of(bundle) == ["fp32"], "without the variant its row goes, the others stay"
    assert engines_of(with_variant(bundle, "bf16", "b" * 64)) == ["fp32"], "another graph was not measured"
    assert engines_of(with_variant(larger, "fp16", "c" * 64)) == ["fp32", "bf16"], "nothing else changed"
    assert engines_of(larger, {"other": "ort-cpu"}) == []


def test_a_bundle_with_other_weights_is_another(bundle: Bundle) -> None:
    keep(bundle)
    files = {name: dataclasses.replace(entry, sha256="d" * 64) for name, entry in bundle.manifest.files.items()}
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, files=files))
    assert recall(other, "cpu", 2) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"{not json",
        lambda data: b"[]",
        lambda data: json.dumps({**data, "schema": 2}).encode(),
        lambda data: json.dumps({**data, "rounds": "7"}).encode(),
        lambda data: json.dumps({**data, "machine": {**data["machine"], "cpu": "another"}}).encode(),
        lambda data: json.dumps({**data, "rows": [{**data["rows"][0], "cost": 0.0}]}).encode(),
        lambda data: b" " * (measurements.MAX_BYTES + 1),
    ],
)
def test_a_damaged_file_is_no_measurement(bundle: Bundle, change: Any) -> None:
    path = keep(bundle)
    path.write_bytes(change(json.loads(path.read_bytes())))
    assert recall(bundle, "cpu", 2) is None


def test_a_store_of_this_machine_holds_it(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.store import EngineStore

    store = tmp_path / "store"
    path = keep(bundle, store=f"file://{store}")
    assert path.parent == store / "measurements"
    assert recall(bundle, "cpu", 2, str(store)) is not None and recall(bundle, "cpu", 2) is None
    monkeypatch.setenv("ACCEL_STORE", str(store))
    assert recall(bundle, "cpu", 2) is not None
    assert EngineStore(store).verify() == [] and EngineStore(store).prune(0) == [] and path.exists(), "no engine"


def test_remote_and_signed_stores_hold_engines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = (tmp_path / "cache" / "measurements",)
    assert folders("s3://bucket/engines") == own and folders() == own
    monkeypatch.setenv("ACCEL_STORE_KEY", "env:KEY")
    assert folders(str(tmp_path)) == own


def test_a_store_that_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    path = keep(bundle, store=str(tmp_path / "store"))
    assert path.parent == tmp_path / "cache" / "measurements"
    assert recall(bundle, "cpu", 2, str(tmp_path / "store")) is not None
    path.unlink()
    path.parent.rmdir()
    (tmp_path / "cache" / "measurements").write_text("a file too")
    with pytest.raises(StorageError, match="ACCEL_CACHE"):
        keep(bundle, store=str(tmp_path / "store"))


def _write_many(path: Path, cost: float) -> None:
    bundle = Bundle.open(path)
    for _ in range(20):
        keep(bundle, row(bundle, cost), row(bundle, cost, "other"))


def test_processes_that_measure_at_once_leave_one_whole_run(bundle: Bundle) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(bundle.path, cost)) for cost in (1.0, 2.0, 3.0)]
    for writer in writers:
        writer.start()
    seen: list[Measurements] = []
    while any(writer.is_alive() for writer in writers):
        found = recall(bundle, "cpu", 2)
        seen += [] if found is None else [found]
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    found = recall(bundle, "cpu", 2)
    assert found is not None
    assert all(len({row.cost for row in one.rows}) == 1 and len(one.rows) == 2 for one in [*seen, found])
