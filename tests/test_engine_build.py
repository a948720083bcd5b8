"""``accel.build``: engines of TensorRT-RTX built without a GPU, stored under keys that tell them apart, found again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accel
from accel import engine_build
from accel.build_commands import describe
from accel.bundle import Bundle
from accel.engine_build import build, past_seconds
from accel.engine_request import prepare, settle
from accel.engines.tensorrt.adapter import load_flavour
from accel.engines.tensorrt.lookup import open_store
from accel.errors import (
    BundleError,
    DependencyError,
    EngineStoreError,
    EngineUnavailableError,
    ExportError,
    InputError,
    RefusedEngineError,
)
from accel.graph.lowering.tensorrt import VERSION
from accel.store import EngineStore
from accel.variants import add_variant

pytest.importorskip("tensorrt_rtx")
ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"target": "rtx", "sm": "sm86", "capacity": 64, "max_batch": 2}
RANGE = {"min": 1, "opt": 1, "max": 1}
PROFILES = {"prefill": {"batch": RANGE, "sequence": {"min": 1, "opt": 8, "max": 32}},
            "decode": {"batch": {"min": 1, "opt": 2, "max": 4}, "sequence": RANGE}}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache and stores stay out of it."""
    for name in ("ACCEL_STORE", "ACCEL_STORE_KEY", "ACCEL_STORE_MAX_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def fp16_decoder(made_once: Callable[[str, Callable[[Path], Any]], Path], tiny_decoder_bundle: Path) -> Path:
    """The tiny llama with an fp16 variant. Read-only."""

    def make(out: Path) -> None:
        add_variant(shutil.copytree(tiny_decoder_bundle, out), "fp16", check=False)

    return made_once("tiny_decoder_fp16", make)


@pytest.fixture
def bundle(fp16_decoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp16_decoder, tmp_path / "bundle"))


def key_of(bundle: Path, **changes: Any) -> str:
    """The digest of one engine's key; nothing is built."""
    asked = {name: value for name, value in {**SMALL, **changes}.items() if name != "target"}
    (request,) = prepare(Bundle.open(bundle), load_flavour("rtx"), asked.pop("sm"), **asked)
    return request.key.digest


def test_builds_once_and_reports(bundle: Path, tmp_path: Path) -> None:
    (report,) = build(bundle, store=tmp_path / "store", **SMALL)
    assert (report.target, report.sm, report.variant, report.capacity) == ("rtx", ("sm86",), "fp16", 64)
    assert report.built and report.max_batch == 2 and report.digest == key_of(bundle)
    facts = report.facts
    assert facts["fused_attention"] == 2 and facts["layers"]["kv_cache_update"] == 4
    assert facts["profile_order"] == ["prefill", "decode"] and facts["proof"]["rows"] > 10
    assert facts["cache_bytes"] == 2 * 64 * 2 * 2 * 2 * 16 * 2  # rows, slots, layers, K and V, heads, size, bytes
    assert facts["buffer_bytes"] > facts["cache_bytes"] + 4 * 32 * 50  # 32 rows of logits, and the inputs
    store = EngineStore(tmp_path / "store")
    (entry,) = store.verify()
    assert entry.problem is None and entry.digest == report.digest and entry.manifest is not None
    assert entry.manifest.size == report.size
    (again,) = build(bundle, store=store, **SMALL)
    assert not again.built and again.digest == report.digest and again.facts == facts


def test_a_hit_reads_no_onnx_and_hashes_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx
    import onnx_ir

    build(bundle, store=tmp_path / "store", **SMALL)
    time.sleep(0.2)  # files that were just written are hashed once more
    prepare(Bundle.open(bundle), load_flavour("rtx"), "sm86")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a hit must not do this")

    for owner, name in (
        (onnx, "load"), (onnx, "load_model"), (onnx, "load_model_from_string"), (onnx_ir, "load"),
        (engine_build, "_build"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr("accel.builder.build.build_plan", refuse)
    monkeypatch.setattr("accel.builder.build.GraphSource", refuse)
    monkeypatch.setattr("accel.store.hashing._hash", refuse)
    began = time.perf_counter()
    (report,) = build(bundle, store=tmp_path / "store", **SMALL)
    assert not report.built and time.perf_counter() - began < 2


def test_the_time_of_a_build_is_that_of_the_nearest(bundle: Path, own_cache: Path) -> None:
    """By precision, level, SM and capacity."""
    opened, flavour = Bundle.open(bundle), load_flavour("rtx")
    build(bundle, store=own_cache / "store", measure=False, **SMALL)
    path = own_cache / "builds" / "history.json"
    (name,) = json.loads(path.read_text())
    assert name.split("; ")[1:] == ["fp16", "level 3", "sm86", "capacity 64"]
    path.write_text(json.dumps({name: {"a": 1.0}, name.replace("fp16", "fp32"): {"a": 5.0}}))
    settings = settle(opened, flavour, "sm89", capacity=32).settings
    assert [past_seconds(opened, flavour, variant, settings) for variant in ("fp16", "fp32")] == [1.0, 5.0]
    usual = f"capacity {settle(opened, flavour, 'sm86', max_batch=1).settings.capacity}"
    path.write_text(json.dumps({name.replace("capacity 64", usual): {"a": 2.0}, name: {"a": 9.0}}))
    job = {"bundle": str(bundle), "target": "rtx", "sm": "sm86", "precision": "fp16", "max_batch": 1}
    (line,) = accel.warmup({"jobs": [job]}, store=own_cache / "other", dry_run=True).engines
    assert line.estimated_seconds == 2.0, "where no capacity is asked for, that of the build counts"


def test_a_limit_that_removed_an_engine_of_the_same_command(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No engine is called built that a later one of the same call has pushed out."""
    monkeypatch.setenv("ACCEL_STORE_MAX_BYTES", "1k")
    asked = {**SMALL, "sm": "sm86,sm89"}
    with pytest.raises(EngineStoreError, match=r"1 of 2 engines .* sm86 fp16. It may hold 0.0 MB") as caught:
        build(bundle, store=tmp_path / "store", **asked)
    assert "ACCEL_STORE_MAX_BYTES" in str(caught.value.remedy)
    (entry,) = open_store(tmp_path / "store").entries()
    assert entry.digest == key_of(bundle, sm="sm89")
    with pytest.raises(EngineStoreError, match=r"holds more than it may.* It may hold 0.0 MB"):
        build(bundle, store=tmp_path / "store", **{**SMALL, "sm": "sm89"})
    monkeypatch.setenv("ACCEL_STORE_MAX_BYTES", "1G")
    (kept,) = build(bundle, store=tmp_path / "store", **{**SMALL, "sm": "sm89"})
    assert not kept.built


@pytest.mark.parametrize("sm", [["SM86", "sm120"], "sm86, sm120", ["sm86,sm120"]])
def test_several_sms(bundle: Path, tmp_path: Path, sm: str | list[str]) -> None:
    asked = {**SMALL, "sm": sm}
    first, second = build(bundle, store=tmp_path / "store", **asked)
    assert (first.sm, second.sm) == (("sm86",), ("sm120",)) and first.built and second.built
    assert len(EngineStore(tmp_path / "store").entries()) == 2


def test_an_outdated_variant_is_lowered_before_it_is_built(bundle: Path, tmp_path: Path) -> None:
    """A bundle that an older accel wrote: its graph is not the one that this version makes."""
    (first,) = build(bundle, store=tmp_path / "store", **SMALL)
    assert sorted(first.facts["sources"]) == ["fp16.tensorrt.onnx", "fp16.weights"]
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    del data["variants"]["fp16"]["graphs"]["tensorrt"]["lowering"]
    path.write_text(json.dumps(data))
    (again,) = build(bundle, store=tmp_path / "store", **SMALL)
    manifest = Bundle.open(bundle, verify=True).manifest
    assert manifest.variants["fp16"].graphs["tensorrt"].lowering == VERSION
    files = {name: entry.sha256 for name, entry in manifest.files.items() if name.startswith("fp16.")}
    assert again.built and again.facts["sources"] == files
    (found,) = build(bundle, store=tmp_path / "store", **SMALL)
    assert not found.built and found.digest == again.digest


def test_a_bundle_without_the_variant_gets_it(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """fp16 where nothing is said; another where it is; and then whatever the bundle has."""
    folder = Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "bundle"))
    (report,) = build(folder, store=tmp_path / "store", **SMALL, precision="bf16")
    assert report.variant == "bf16" and set(Bundle.open(folder).manifest.variants) == {"fp32", "bf16"}
    (report,) = build(folder, store=tmp_path / "store", **SMALL)
    assert report.variant == "bf16" and not report.built
    other = Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "other"))
    key_of(other)
    assert set(Bundle.open(other).manifest.variants) == {"fp32", "fp16"}


def test_profiles_reach_the_engine(bundle: Path, tmp_path: Path) -> None:
    (report,) = build(bundle, "rtx", "sm86", capacity=64, profiles=PROFILES, store=tmp_path / "store")
    assert report.max_batch == 4 and report.facts["profile_order"] == ["prefill", "decode"]
    (entry,) = EngineStore(tmp_path / "store").entries()
    assert entry.manifest is not None
    assert entry.manifest.key.profiles["decode"]["past.0.key"] == ((1, 2, 64, 16), (2, 2, 64, 16), (4, 2, 64, 16))


def test_missing_packages_and_targets(bundle: Path) -> None:
    if not shutil.which("nvidia-smi"):
        with pytest.raises(DependencyError, match=r'TensorRT is not installed .*pip install "tensorrt>=10\.15\.1"'):
            build(bundle, "tensorrt", "sm86")
    with pytest.raises(InputError, match="no target 'trt'"):
        build(bundle, "trt", "sm86")
    with pytest.raises(BundleError, match="no bundle directory"):
        build(bundle / "absent", "rtx", "sm86")


def test_a_variant_that_cannot_be_made(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ExportError("the weight is too large", remedy="Use bf16")

    monkeypatch.setattr("accel.variants.add_variant", refuse)
    with pytest.raises(ExportError, match="too large"):
        build(bundle, store=tmp_path / "store", **SMALL)
    assert EngineStore(tmp_path / "store").entries() == []


def test_a_signed_store(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine without the key's signature is refused, and built again by whoever can sign."""
    store = tmp_path / "store"
    (unsigned,) = build(bundle, store=store, **SMALL)
    monkeypatch.setenv("SECRET", "ab" * 32)
    monkeypatch.setenv("ACCEL_STORE_KEY", "env:SECRET")
    (request,) = prepare(Bundle.open(bundle), load_flavour("rtx"), "sm86", capacity=64, max_batch=2)
    with pytest.raises(RefusedEngineError, match="(?i)sign"):
        open_store(store).get(request.key)
    (signed,) = build(bundle, store=store, **SMALL)
    assert signed.built and signed.digest == unsigned.digest
    (again,) = build(bundle, store=store, **SMALL)
    assert not again.built
    monkeypatch.setenv("SECRET", "cd" * 32)
    with pytest.raises(RefusedEngineError):
        open_store(store).get(request.key)


def test_a_damaged_engine_is_built_again(bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build(bundle, store=store, **SMALL)
    (plan,) = store.rglob("*.plan")
    plan.write_bytes(plan.read_bytes()[:1000])
    (report,) = build(bundle, store=store, **SMALL)
    assert report.built and [entry.problem for entry in EngineStore(store).verify()] == [None]


def test_the_store_that_is_used(bundle: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store().url == str(own_cache / "engines")
    monkeypatch.setenv("ACCEL_STORE", str(tmp_path / "named"))
    assert open_store().url == str(tmp_path / "named")
    assert open_store(tmp_path / "given").url == str(tmp_path / "given")


def test_what_was_built_for_this_gpu_is_timed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(request: Any, engine: Any, _: Any) -> dict[str, float]:
        asked.append(engine.manifest.key.sm[0])
        if engine.manifest.key.sm != ("sm86",):
            raise EngineUnavailableError("no GPU sm89 here")
        return {"decode": 1.5}

    monkeypatch.setattr("accel.engine_latency.measure_engine", measure)
    first, second = build(bundle, store=tmp_path / "store", **{**SMALL, "sm": "sm86,sm89"})
    assert first.latency_ms == {"decode": 1.5} and first.not_measured is None and asked == ["sm86", "sm89"]
    assert second.built and second.latency_ms is None and second.not_measured == "no GPU sm89 here"
    (again,) = build(bundle, store=tmp_path / "store", **SMALL)
    assert again.latency_ms is None and again.not_measured == "the store had it" and len(asked) == 2
    (unasked,) = build(bundle, store=tmp_path / "store", measure=False, **{**SMALL, "sm": "sm120"})
    assert unasked.built and unasked.not_measured == "not asked for" and len(asked) == 2
    assert "latency: decode 1.50 ms" in "\n".join(describe(first))


def test_the_environment_limits_the_store(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store().max_bytes is None
    monkeypatch.setenv("ACCEL_STORE_MAX_BYTES", "1k")
    assert open_store().max_bytes == 1000 and open_store(tmp_path, max_bytes=7).max_bytes == 7
    for sm in ("sm86", "sm89"):
        with pytest.raises(EngineStoreError, match="holds more than it may"):
            build(bundle, store=tmp_path / "store", **{**SMALL, "sm": sm})
    (entry,) = open_store(tmp_path / "store").entries()
    assert entry.manifest is not None and entry.manifest.key.sm == ("sm89",)
    for wrong in ("20 gallons", "-1", "nan"):
        monkeypatch.setenv("ACCEL_STORE_MAX_BYTES", wrong)
        with pytest.raises(InputError, match=f"'{wrong}' is no size .at ACCEL_STORE_MAX_BYTES.*500M"):
            open_store()


def test_a_cold_store_names_the_command(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.engines.tensorrt.registry.current_sm", lambda: "sm86")
    with pytest.raises(
        EngineUnavailableError, match=r"accel build .* --target rtx --sm sm86 --precision fp16"
    ) as caught:
        accel.load(bundle, engine="rtx", capacity=64)
    assert "--capacity 64" in str(caught.value) and "build='allow'" in str(caught.value)


def test_load_builds_only_when_it_may(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("accel.engines.tensorrt.registry", "accel.engine_build", "accel.engine_request"):
        monkeypatch.setattr(f"{target}.current_sm", lambda: "sm86")
    opened: list[Any] = []

    def stop(_: Any, chosen: str, options: Any, plan: memoryview, facts: Any, *__: Any, **___: Any) -> Any:
        opened.append((chosen, len(plan), facts.sms, facts.sources))
        raise EngineUnavailableError("this is where a GPU would run it")

    monkeypatch.setattr("accel.engines.tensorrt.open.open_tensorrt", stop)
    with pytest.raises(InputError, match="build must be 'never' or 'allow'"):
        accel.load(bundle, engine="rtx", build="always")  # type: ignore[arg-type]
    for engine in ("auto", "ort-cpu"):
        with pytest.raises(InputError, match="for a named TensorRT engine.*engine='rtx'"):
            accel.load(bundle, engine=engine, build="allow")
    with pytest.raises(EngineUnavailableError, match="where a GPU would run it"):
        accel.load(bundle, engine="rtx", build="allow", capacity=64, store=tmp_path / "store")
    (entry,) = EngineStore(tmp_path / "store").entries()
    assert entry.manifest is not None
    files = Bundle.open(bundle).manifest.files
    sources = {name: files[name].sha256 for name in ("fp16.tensorrt.onnx", "fp16.weights")}
    assert opened == [("fp16", entry.manifest.size, ("sm86",), sources)]
    with pytest.raises(EngineUnavailableError, match="where a GPU would run it"):  # now it need not
        accel.load(bundle, engine="rtx", capacity=32, store=tmp_path / "store")
    assert len(opened) == 2
    with pytest.raises(EngineUnavailableError, match="do not fit sm86 --capacity 512: it has sm86, capacity 64"):
        accel.load(bundle, engine="rtx", capacity=512, store=tmp_path / "store")


RACE = """
import sys
from accel import engine_build
from accel.builder import build as building
from accel.builder.build import build_plan
def noted(*arguments, **options):
    with open(sys.argv[3], "a") as stream:
        stream.write("built\\n")
    return build_plan(*arguments, **options)
building.build_plan = noted
print("ready", flush=True)
sys.stdin.readline()
(report,) = engine_build.build(sys.argv[1], "rtx", "sm86", capacity=64, max_batch=2, store=sys.argv[2])
print("built" if report.built else "found", report.digest, report.size, flush=True)
"""


@pytest.mark.slow
def test_sixteen_processes_build_once(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(bundle), str(tmp_path / "store"), str(tmp_path / "log")]
    environment, pipe = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment) for _ in range(16)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0].split() for process in processes]
    assert sorted(words[0] for words in said) == ["built"] + ["found"] * 15
    assert len({tuple(words[1:]) for words in said}) == 1
    assert (tmp_path / "log").read_text() == "built\n"
