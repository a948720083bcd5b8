"""Choosing among stored engines: the smallest that is enough, for this SM, from this bundle, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel.bundle import Bundle
from accel.engines.session import SessionOptions
from accel.engines.tensorrt import registry
from accel.engines.tensorrt.adapter import Flavour, load_flavour
from accel.engines.tensorrt.kernel_cache import kernels_path
from accel.engines.tensorrt.lookup import find_engine, hash_sources, open_store, passes_of, pick_precision
from accel.errors import BundleError, EngineBrokenError, EngineUnavailableError, RefusedEngineError
from accel.store import EngineKey, EngineStore, HashCache
from accel.variants import add_variant
from tests.store.samples import key

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCEL_STORE", "ACCEL_STORE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tiny_decoder_bundle: Path, tmp_path: Path) -> Bundle:
    return add_variant(shutil.copytree(tiny_decoder_bundle, tmp_path / "bundle"), "fp16", check=False)


@pytest.fixture
def flavour() -> Flavour:
    return load_flavour("rtx")


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


def of_rows(low: int, high: int) -> dict[str, Any]:
    """Profiles of a decoder whose steps have between ``low`` and ``high`` rows."""
    return {
        "prefill": {"input_ids": ((1, 1), (1, 64), (1, 128))},
        "decode": {"input_ids": ((low, 1), (high, 1), (high, 1))},
    }


@pytest.fixture
def keep(bundle: Bundle, flavour: Flavour, store: EngineStore) -> Callable[..., EngineKey]:
    """Puts an engine of the bundle; its plan says which one it is."""
    sources, passes = hash_sources(bundle, "fp16"), passes_of(bundle, "fp16")

    def put(
        sm: str = "sm86", capacity: int | None = 256, rows: int = 4, level: str = "none",
        files: dict[str, str] | None = sources.files, **changes: Any,
    ) -> Any:  # fmt: skip
        settled = {
            "graph": sources.graph, "weights": sources.weights, "passes": passes, "profiles": of_rows(1, rows),
            **changes,
        }  # fmt: skip
        made = key(
            library_version=flavour.version, sm=tuple(sm.split("+")), capacity=capacity, flags={"rows": rows}, **settled
        )
        facts = {"max_batch": rows, "hardware_compatibility": level, "profile_order": ["prefill", "decode"]}
        store.put(made, f"{sm} {capacity} {rows} {level}".encode(), {**facts, **({"sources": files} if files else {})})
        return made

    return put


def test_the_smallest_that_is_enough_or_the_largest(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey]
) -> None:
    for sm, capacity, rows in (("sm86", 512, 4), ("sm86", 256, 8), ("sm86", 256, 4), ("sm86", 1024, 1),
                               ("sm86+sm89", 128, 4), ("sm89", 2048, 16)):  # fmt: skip
        keep(sm, capacity, rows)

    def found(sm: str, **options: Any) -> str:
        engine, facts = find_engine(store, bundle, "fp16", flavour, sm, SessionOptions(**options))
        with engine:
            assert sm in facts.sms and facts.size == len(engine.plan()) and facts.version == flavour.version
            assert facts.profiles == ("prefill", "decode")
            assert set(facts.sources) == {"fp16.tensorrt.onnx", "fp16.weights"}
            return bytes(engine.plan()).decode()

    assert found("sm86") == "sm86 1024 1 none"  # nothing asked: no small test engine may take a large one's place
    assert found("sm86", capacity=256) == "sm86 256 8 none"
    assert found("sm86", capacity=256, max_batch=4) == "sm86 256 4 none"
    assert found("sm86", capacity=257) == "sm86 512 4 none"
    assert found("sm86", max_batch=5) == "sm86 256 8 none"
    assert found("sm86", capacity=100, max_batch=1) == "sm86 256 4 none"
    assert found("sm86", capacity=1024) == "sm86 1024 1 none"
    assert found("sm89") == "sm89 2048 16 none"  # for this SM alone before one for several
    with pytest.raises(EngineUnavailableError, match="do not fit sm86 --capacity 1024 --max-batch 2: it has .*sm86"):
        found("sm86", capacity=1024, max_batch=2)
    with pytest.raises(EngineUnavailableError, match="do not fit sm120.*accel build .*--target rtx --sm sm120"):
        found("sm120")


def test_profiles_must_take_the_rows(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey]
) -> None:
    """Opening another one would fail, though a larger one stands beside it."""
    keep("sm86", 256, 8, profiles=of_rows(4, 8))
    keep("sm86", 256, 16, profiles=of_rows(1, 16))

    def found(**options: Any) -> str:
        with find_engine(store, bundle, "fp16", flavour, "sm86", SessionOptions(**options))[0] as engine:
            return bytes(engine.plan()).decode()

    assert found(max_batch=2) == "sm86 256 16 none"
    assert found(max_batch=4) == found(max_batch=8) == "sm86 256 8 none"
    only = EngineStore(store.url + "-other")
    facts = {"max_batch": 8, "sources": hash_sources(bundle, "fp16").files}
    only.put(keep("sm86", 256, 8, profiles=of_rows(4, 8)), b"plan", facts)
    with pytest.raises(EngineUnavailableError, match="do not fit sm86 --max-batch 2: it has .*batch 4 to 8"):
        find_engine(only, bundle, "fp16", flavour, "sm86", SessionOptions(max_batch=2))
    never = EngineStore(store.url + "-never")
    wide = {"all": {"input_ids": ((1, 2), (1, 64), (8, 128))}}
    never.put(keep("sm86", 256, 8, profiles=wide), b"plan", facts)
    with pytest.raises(EngineUnavailableError, match="do not fit sm86"):  # no steps of single tokens
        find_engine(never, bundle, "fp16", flavour, "sm86", SessionOptions())


def test_the_gpu_it_was_timed_on(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey]
) -> None:
    """Goes before effort, after size; another GPU of the SM takes it too."""
    keys = {gpu: keep(gpu=gpu, optimization_level=level) for gpu, level in (("A", 3), ("B", 5), ("C", 4))}

    def found(gpu: str | None) -> str:
        with find_engine(store, bundle, "fp16", flavour, "sm86", SessionOptions(), gpu)[0] as engine:
            return next(name for name, made in keys.items() if made.digest == engine.manifest.key.digest)

    assert [found(gpu) for gpu in ("A", "B", "C", "D", None)] == ["A", "B", "C", "B", "B"]
    keys["large"] = keep(gpu="B", capacity=512)
    assert found("A") == "large"


def test_encoders_for_long_rows_first(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey]
) -> None:
    for rows, tokens in ((64, 512), (4, 8192), (8, 2048)):
        keep(capacity=None, rows=rows, profiles={"encode": {"input_ids": ((1, 1), (rows, 128), (rows, tokens))}})
    with find_engine(store, bundle, "fp16", flavour, "sm86", SessionOptions())[0] as engine:
        assert bytes(engine.plan()).decode() == "sm86 None 4 none"


def test_portable_engines(bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey]) -> None:
    keep("sm80", 256, 4, "ampere+")
    for sm, fits in (("sm80", True), ("sm89", True), ("sm120", True), ("sm75", False)):
        if fits:
            engine, facts = find_engine(store, bundle, "fp16", flavour, sm, SessionOptions())
            assert facts.compatibility == "ampere+"
            engine.close()
            continue
        with pytest.raises(EngineUnavailableError, match=f"do not fit {sm}"):
            find_engine(store, bundle, "fp16", flavour, sm, SessionOptions())


@pytest.mark.parametrize("changes", [{"library_version": "1.0"}, {"target": "tensorrt"}, {"variant": "bf16"},
                                     {"graph": "1" * 64}, {"weights": "2" * 64}])  # fmt: skip
def test_engines_of_something_else_are_not_seen(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey], changes: dict[str, str]
) -> None:
    made = dataclasses.replace(keep(), **changes)
    own = EngineStore(store.url + "-other")
    own.put(made, b"plan", {"max_batch": 4})
    with pytest.raises(EngineUnavailableError, match=f"the store has no TensorRT-RTX {flavour.version} engine"):
        find_engine(own, bundle, "fp16", flavour, "sm86", SessionOptions())


def test_engines_of_other_passes_do_not_fit(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey]
) -> None:
    """The graph's file is the same, and yet an engine of another repair computes something else."""
    made = passes_of(bundle, "fp16")
    assert made is not None
    keep(passes=f"{made}1")
    with pytest.raises(EngineUnavailableError, match=rf"by passes {made}1; its variant fp16 has {made}.*accel build"):
        find_engine(store, bundle, "fp16", flavour, "sm86", SessionOptions())
    keep(capacity=512)
    engine, _ = find_engine(store, bundle, "fp16", flavour, "sm86", SessionOptions(capacity=64))
    with engine:  # the other one would be the smaller
        assert bytes(engine.plan()).decode() == "sm86 512 4 none"


def test_a_variant_of_an_unknown_lowering_has_no_engine(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey]
) -> None:
    keep()
    path = bundle.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["variants"]["fp16"]["graphs"]["tensorrt"]["lowering"] = None  # written before it was recorded
    path.write_text(json.dumps(manifest))
    with pytest.raises(EngineUnavailableError, match="variant fp16 has None.*accel build"):
        find_engine(store, Bundle.open(bundle.path), "fp16", flavour, "sm86", SessionOptions())


@pytest.mark.parametrize("files", [None, {"fp16.tensorrt.onnx": "1" * 64, "fp16.weights": "2" * 64}])
def test_engines_built_from_other_files_do_not_fit(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey], files: dict[str, str] | None
) -> None:
    """What was noted at the build counts, not what lies in the bundle now."""
    keep(files=files)
    with pytest.raises(EngineUnavailableError, match="the store has no TensorRT-RTX"):
        find_engine(store, bundle, "fp16", flavour, "sm86", SessionOptions())


def test_a_damaged_engine_is_passed_over(
    bundle: Bundle, flavour: Flavour, store: EngineStore, keep: Callable[..., EngineKey]
) -> None:
    keep("sm86", 512, 4)
    (plan,) = Path(store.url).rglob("*.plan")
    plan.write_bytes(b"x" + plan.read_bytes()[1:])
    with pytest.raises(EngineUnavailableError):
        find_engine(store, bundle, "fp16", flavour, "sm86", SessionOptions())
    keep("sm86", 256, 4)
    engine, _ = find_engine(store, bundle, "fp16", flavour, "sm86", SessionOptions())
    with engine:
        assert bytes(engine.plan()).decode() == "sm86 256 4 none"


def test_sources_are_what_lies_on_the_disk(bundle: Bundle, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes")
    before = hash_sources(bundle, "fp16", cache)
    assert before == hash_sources(bundle, "fp16", cache) and len(before.graph) == len(before.weights) == 64
    with pytest.raises(BundleError, match="no graph for target 'tensorrt'"):
        hash_sources(bundle, "fp32", cache)
    weights = bundle.file("fp16.weights")
    data = bytearray(weights.read_bytes())
    data[50] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="sha256 differs .*fp16.weights"):
        hash_sources(bundle, "fp16", cache)


def test_the_precision_that_runs(bundle: Bundle) -> None:
    assert pick_precision(bundle, "auto") == pick_precision(bundle, "fp16") == "fp16"
    assert pick_precision(bundle, "fp32") is None
    with pytest.raises(BundleError, match="no variant 'bf16'"):
        pick_precision(bundle, "bf16")
    both = add_variant(add_variant(bundle, "fp32", check=False), "bf16", check=False)
    assert pick_precision(both, "auto") == "fp16" and pick_precision(both, "fp32") == "fp32"


def test_keys_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An HMAC key signs and checks; a public key only checks."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    secret, public = tmp_path / "secret", tmp_path / "public.pem"
    secret.write_text("ab" * 32)
    form = PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, form))
    monkeypatch.setenv("ACCEL_STORE_KEY", str(secret))
    signed = open_store(tmp_path / "store")
    assert signed.put(key(), b"plan").signature is not None
    engine = open_store(tmp_path / "store").get(key())
    assert engine is not None
    engine.close()
    monkeypatch.setenv("ACCEL_STORE_KEY", str(public))
    with pytest.raises(RefusedEngineError):
        open_store(tmp_path / "store").get(key())
    with pytest.raises(Exception, match="(?i)sign"):
        open_store(tmp_path / "store").put(key(capacity=1), b"plan")


def test_probe(bundle: Bundle, tiny_decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = registry.probe_for("rtx")
    monkeypatch.setattr(registry, "current_sm", lambda: None)
    for lacking, said in ((None, "needs an NVIDIA GPU and its driver; CUDA finds none here"), ("there is no GPU",) * 2):
        monkeypatch.setattr(registry, "missing_gpu", lambda lacking=lacking: lacking)
        assert str(probe(bundle, "auto")).endswith(said)
        with monkeypatch.context() as patch:
            patch.setattr(registry, "find_spec", lambda name: None)
            wanted = lacking or "TensorRT-RTX runs through cuda-python, which is not installed"
            assert str(probe(bundle, "auto")).startswith(wanted)
    monkeypatch.setattr(registry, "current_sm", lambda: "sm86")
    assert probe(bundle, "auto") is None and probe(bundle, "fp16") is None
    assert "no TensorRT graph for variant 'fp32': accel build" in str(probe(bundle, "fp32"))
    assert "--target rtx makes one" in str(probe(Bundle.open(tiny_decoder_bundle), "auto"))
    for lacking, said in ((None, 'pip install "tensorrt>=10.15.1"'), ("there is no GPU", "^there is no GPU$")):
        monkeypatch.setattr(registry, "missing_gpu", lambda lacking=lacking: lacking)
        assert re.search(said, str(registry.probe_for("tensorrt")(bundle, "auto")))


class Session:
    def __init__(self) -> None:
        self.closed = self.captured = 0
        self.error: Exception | None = None

    def capture_graphs(self) -> None:
        self.captured += 1
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed += 1


def test_an_open_session_keeps_its_engine(
    bundle: Bundle, store: EngineStore, keep: Callable[..., EngineKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, given = Session(), list[Any]()
    monkeypatch.setattr(registry, "current_sm", lambda: "sm86")
    made = keep()

    def open_it(bundle: Bundle, variant: str, options: Any, plan: memoryview, facts: Any, *_: Any, **more: Any) -> Any:
        given.append((variant, bytes(plan), facts.sms, more["kernels"]))
        return session

    monkeypatch.setattr("accel.engines.tensorrt.open.open_tensorrt", open_it)
    opened: Any = registry.open_for("rtx")(bundle, "auto", SessionOptions(store=store.url))
    assert given == [("fp16", b"sm86 256 4 none", ("sm86",), kernels_path(made, "sm86"))]
    assert session.captured == 1 and store.prune(0) == []  # in use
    opened.close()
    assert session.closed == 1 and [record.digest for record in store.prune(0)] == [made.digest]


def test_a_gpu_that_breaks_at_the_first_runs(
    bundle: Bundle, store: EngineStore, keep: Callable[..., EngineKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any request: the next engine is tried."""
    session = Session()
    session.error = EngineBrokenError("CUDA failed")
    monkeypatch.setattr(registry, "current_sm", lambda: "sm86")
    keep()
    monkeypatch.setattr("accel.engines.tensorrt.open.open_tensorrt", lambda *_, **__: session)
    with pytest.raises(EngineBrokenError):
        registry.open_for("rtx")(bundle, "auto", SessionOptions(store=store.url))
    assert session.closed == 1 and len(store.prune(0)) == 1


def test_a_session_that_fails_lets_its_engine_go(
    bundle: Bundle, store: EngineStore, keep: Callable[..., EngineKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "current_sm", lambda: "sm86")
    keep()

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("accel.engines.tensorrt.open.open_tensorrt", fail)
    with pytest.raises(MemoryError):
        registry.open_for("rtx")(bundle, "auto", SessionOptions(store=store.url))
    assert len(store.prune(0)) == 1
    with pytest.raises(EngineUnavailableError, match="has no TensorRT-RTX .* Build it beforehand: accel build"):
        registry.open_for("rtx")(bundle, "auto", SessionOptions(store=store.url))
