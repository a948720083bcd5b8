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
from accel.bundle import Bundle
from accel.engine_build import build, prepare
from accel.engines.tensorrt.adapter import load_flavour
from accel.engines.tensorrt.lookup import open_store
from accel.errors import (
    AccelError,
    BundleError,
    DependencyError,
    EngineUnavailableError,
    ExportError,
    InputError,
    RecipeError,
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
    for name in ("ACCEL_STORE", "ACCEL_STORE_KEY"):
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


def test_keys_tell_engines_apart(bundle: Path) -> None:
    add_variant(bundle, "bf16", check=False)
    changes: list[dict[str, Any]] = [
        {}, {"precision": "bf16"}, {"capacity": 128}, {"max_batch": 4}, {"sm": "sm89"}, {"optimization_level": 1},
        {"workspace": 1 << 28}, {"profiles": PROFILES},
    ]  # fmt: skip
    digests = [key_of(bundle, **change) for change in changes]
    assert len(set(digests)) == len(changes)
    assert digests == [key_of(bundle, **change) for change in changes]
    assert key_of(bundle, sm="SM86") == key_of(bundle, sm=["sm86"]) == digests[0]
    assert key_of(bundle, precision="fp16") == digests[0]


def test_copies_of_a_bundle_share_engines(bundle: Path, tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """Also where each added the variant itself."""
    other = add_variant(shutil.copytree(tiny_decoder_bundle, tmp_path / "other"), "fp16").path
    assert key_of(other) == key_of(bundle)


@pytest.mark.parametrize("part", ["weights", "graph", "norms in the fp32 file"])
def test_another_bundle_has_another_key(bundle: Path, part: str) -> None:
    """Changed bytes are an error, and another key where the manifest was changed with them."""
    names = {"weights": "fp16.weights", "graph": "fp16.tensorrt.onnx", "norms in the fp32 file": "fp32.weights"}
    before, path = key_of(bundle), bundle / names[part]
    data = bytearray(path.read_bytes())
    if part == "graph":
        place = data.index(b"logits_positions")
        data[place : place + 1] = b"L"
    else:
        data[100] ^= 1
    path.write_bytes(data)
    if part == "norms in the fp32 file":  # no byte of the fp16 engine comes from there
        assert key_of(bundle) == before
        return
    with pytest.raises(BundleError, match=f"sha256 differs .*{names[part]}"):
        key_of(bundle)
    describe_again(bundle, names[part])
    assert key_of(bundle) != before


def describe_again(bundle: Path, name: str) -> None:
    """The manifest takes a changed file for the right one."""
    from accel.bundle import file_entry

    data = json.loads((bundle / "manifest.json").read_text())
    entry = file_entry(bundle / name)
    data["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_several_sms(bundle: Path, tmp_path: Path) -> None:
    asked = {**SMALL, "sm": ["SM86", "sm120"]}
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


def test_an_encoder(minilm_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minilm_bundle, tmp_path / "minilm"))
    with pytest.raises(InputError, match="capacity sizes a decoder's cache"):
        build(folder, "rtx", "sm86", capacity=64)
    assert "fp16" not in Bundle.open(folder).manifest.variants  # it was said before anything was made
    (request,) = prepare(Bundle.open(folder), load_flavour("rtx"), "sm89")
    assert request.max_batch == 32 and request.key.capacity is None
    assert request.key.profiles["encode"]["input_ids"] == ((1, 1), (32, 128), (32, 512))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "fp8"}, InputError, "unknown variant 'fp8'.*Did you mean"),
        ({"sm": "sm90"}, InputError, "does not support sm90"),
        ({"sm": []}, InputError, "No SM"),
        ({"sm": ["sm86", "sm86"]}, InputError, "stands twice"),
        ({"capacity": 0}, InputError, "capacity must be"),
        ({"capacity": 1024}, InputError, "1024 is more than the model's 512 positions"),
        ({"max_batch": -1}, InputError, "max_batch must be"),
        ({"optimization_level": 9}, InputError, "no optimization level 9"),
        ({"hardware_compatibility": "same"}, InputError, "hardware compatibility"),
        ({"profiles": {"decode": {"batch": RANGE}}}, RecipeError, "sequence"),
        ({"profiles": {}}, InputError, "There is no profile"),
        ({"profiles": {"a": {"batch": {"min": 3, "opt": 2, "max": 1}, "sequence": RANGE}}}, InputError, "not 3, 2, 1"),
        ({"profiles": {"a": {"batch": RANGE, "sequence": {"min": 1, "opt": 8, "max": 65}}}}, InputError, "to 65"),
        ({"profiles": {"a": {"batch": {"min": 2, "opt": 2, "max": 2}, "sequence": RANGE}}}, InputError, "no profile"),
    ],
)
def test_wrong_requests(
    bundle: Path, tmp_path: Path, changes: dict[str, Any], error: type[AccelError], message: str
) -> None:
    with pytest.raises(error, match=f"(?i){message}"):
        build(bundle, store=tmp_path / "store", **{**SMALL, **changes})
    assert EngineStore(tmp_path / "store").entries() == []


def test_profiles_reach_the_engine(bundle: Path, tmp_path: Path) -> None:
    (report,) = build(bundle, "rtx", "sm86", capacity=64, profiles=PROFILES, store=tmp_path / "store")
    assert report.max_batch == 4 and report.facts["profile_order"] == ["prefill", "decode"]
    (entry,) = EngineStore(tmp_path / "store").entries()
    assert entry.manifest is not None
    assert entry.manifest.key.profiles["decode"]["past.0.key"] == ((1, 2, 64, 16), (2, 2, 64, 16), (4, 2, 64, 16))


def test_capacity_is_the_model_s_where_it_is_short(bundle: Path) -> None:
    (request,) = prepare(Bundle.open(bundle), load_flavour("rtx"), "sm86")
    assert request.settings.capacity == request.key.capacity == 512 and request.max_batch == 8


def test_sm_auto_without_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "current_sm", lambda: None)
    for asked in ("auto", ["auto"]):
        with pytest.raises(InputError, match="no GPU here to build for .*at sm.*--sm sm89.*sm120"):
            build(bundle, "rtx", asked)
    monkeypatch.setattr(engine_build, "current_sm", lambda: "sm120")
    (request,) = prepare(Bundle.open(bundle), load_flavour("rtx"), "auto")
    assert request.key.sm == ("sm120",)


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


def test_a_cold_store_names_the_command(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.engines.tensorrt.registry.current_sm", lambda: "sm86")
    with pytest.raises(
        EngineUnavailableError, match=r"accel build .* --target rtx --sm sm86 --precision fp16"
    ) as caught:
        accel.load(bundle, engine="rtx", capacity=64)
    assert "--capacity 64" in str(caught.value) and "build='allow'" in str(caught.value)


def test_load_builds_only_when_it_may(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("accel.engines.tensorrt.registry", "accel.engine_build"):
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
