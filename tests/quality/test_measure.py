from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

import accel.engines as engines
from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.errors import BundleError, EngineError, EngineUnavailableError, InputError, QualityError
from accel.quality import Gate, Reference, Settings, measure_reference, measure_variant, resolve_text, timing
from tests.compress.test_quantize import Told
from tests.quality.rounded import write_rounded
from tests.runtime.breaking import Shelf

TEXT = resolve_text([f"Passage {index} says that {index} and {index * 7} are numbers." for index in range(30)])
SETTINGS = Settings(threads=1, new_tokens=8)


@pytest.fixture(scope="module")
def reference(rounded_decoder: Path) -> Reference:
    return measure_reference(Bundle.open(rounded_decoder), TEXT, SETTINGS)


@pytest.fixture(scope="module")
def minilm(rounded_minilm: Path) -> Reference:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", 1)
        return measure_reference(Bundle.open(rounded_minilm), None, Settings(threads=2, max_tokens=1500))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_finer_weights_lose_less(rounded_decoder: Path, reference: Reference) -> None:
    bundle = Bundle.open(rounded_decoder)
    fine, coarse = (measure_variant(bundle, name, reference=reference) for name in ("fine", "coarse"))
    for quality in (fine, coarse):
        assert quality.likelihood is not None and quality.greedy is not None and quality.encoder is None
        assert quality.likelihood.tokens == reference.plan.tokens - 30 and quality.likelihood.blocks == 30
        low, high = quality.likelihood.interval or (0, 0)
        assert low < quality.likelihood.difference < high
        assert quality.text_sha256 == TEXT.sha256 and quality.engine.startswith("ort-cpu ")
        assert [timings.name for timings in quality.timings] == ["prefill of 128 tokens", "decode step"]
        assert quality.reference_timings == reference.quality.timings
    assert fine.likelihood is not None and coarse.likelihood is not None and fine.greedy and coarse.greedy
    assert abs(fine.likelihood.difference) < 0.01 < abs(coarse.likelihood.difference)
    assert coarse.greedy.top1 < fine.greedy.top1 <= 1 and fine.greedy.new_tokens == 8
    assert coarse.greedy.prefix <= fine.greedy.prefix


def test_progress_is_told(rounded_decoder: Path, reference: Reference) -> None:
    told = Told()
    measure_variant(Bundle.open(rounded_decoder), "coarse", reference=reference, progress=told)
    assert told.stages == [("Measuring coarse on ort-cpu", reference.plan.tokens, reference.plan.tokens)]


def test_fp32_against_itself(rounded_decoder: Path, reference: Reference) -> None:
    quality = measure_variant(Bundle.open(rounded_decoder), "fp32", reference=reference, max_q_drop=0)
    assert quality == reference.quality and quality.greedy is None and quality.byte_ratio == quality.number_ratio == 1
    assert quality.likelihood is not None
    assert (quality.likelihood.difference, quality.likelihood.interval) == (0, None)


def test_too_much_lost_is_refused(rounded_decoder: Path, reference: Reference) -> None:
    bundle = Bundle.open(rounded_decoder)
    quality = measure_variant(bundle, "coarse", reference=reference)
    assert quality.likelihood is not None
    drop = -quality.likelihood.difference
    assert drop > 0.01
    with pytest.raises(QualityError, match=rf"coarse loses {drop:.4f} of Q .*95 % interval.*0.01 is allowed") as info:
        measure_variant(bundle, "coarse", reference=reference, max_q_drop=0.01)
    assert info.value.value == pytest.approx(drop) and info.value.limit == 0.01
    assert info.value.remedy is not None and "finer scheme" in info.value.remedy
    measure_variant(bundle, "coarse", reference=reference, max_q_drop=drop + 1e-6)
    measure_variant(bundle, "fine", reference=reference, max_q_drop=0.01)


def test_encoders_are_held_to_their_cosine(
    rounded_minilm: Path, minilm: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 1)
    bundle = Bundle.open(rounded_minilm)
    fine = measure_variant(bundle, "fine", reference=minilm, min_cosine=0.997)
    assert fine.encoder is not None and fine.likelihood is None and fine.greedy is None
    assert fine.encoder.output == "embeddings" and fine.encoder.tokens <= 1500
    assert fine.encoder.rank_correlation is not None and fine.encoder.rank_correlation > 0.99
    with pytest.raises(QualityError, match=r"embeddings of variant coarse have a mean cosine of 0\.\d+") as info:
        measure_variant(bundle, "coarse", reference=minilm, min_cosine=0.997)
    assert info.value.value < 0.997 == info.value.limit


def test_a_refused_variant_is_not_written(tmp_path: Path, tiny_decoder_bundle: Path, reference: Reference) -> None:
    shutil.copytree(tiny_decoder_bundle, tmp_path / "b")
    bundle, before = Bundle.open(tmp_path / "b"), content(tmp_path / "b")
    with pytest.raises(QualityError), BundleExtension(bundle) as extension:
        manifest = write_rounded(extension.bundle, extension.path, 3)
        with extension.preview(manifest) as preview:
            measure_variant(preview, "rounded", reference=reference, max_q_drop=0.001)
    assert content(bundle.path) == before and not list(bundle.path.glob(".*"))
    assert all(path.stat().st_nlink == 1 for path in bundle.path.iterdir())


def test_an_accepted_one_carries_its_quality(tmp_path: Path, tiny_decoder_bundle: Path, reference: Reference) -> None:
    shutil.copytree(tiny_decoder_bundle, tmp_path / "b")
    with BundleExtension(Bundle.open(tmp_path / "b")) as extension:
        manifest = write_rounded(extension.bundle, extension.path, 8)
        with extension.preview(manifest) as preview:
            quality = measure_variant(preview, "rounded", reference=reference, max_q_drop=0.01)
        assert [path.name for path in extension.path.iterdir() if path.is_dir()] == []
        variant = dataclasses.replace(manifest.variants["rounded"], quality=quality)
        committed = extension.commit(dataclasses.replace(manifest, variants={**manifest.variants, "rounded": variant}))
    opened = Bundle.open(committed.path, verify=True)
    assert opened.variant("rounded").quality == quality and opened.variant("fp32").quality is None


def test_reference_is_measured_when_it_is_not_given(rounded_decoder: Path) -> None:
    quality = measure_variant(Bundle.open(rounded_decoder), "fine")
    assert quality.text == "built-in" and quality.likelihood is not None and quality.likelihood.blocks >= 40


@pytest.mark.parametrize(
    "limits,message",
    [
        ({"min_cosine": 0.9}, "min_cosine is for encoders.*max_q_drop"),
        ({"max_q_drop": -1}, "number from 0 to inf, not -1"),
        ({"max_q_drop": float("nan")}, "not nan"),
        ({"max_q_drop": True}, "not True"),
        ({"max_q_drop": "0.1"}, "not '0.1'"),
    ],
)
def test_limits_of_no_use(rounded_decoder: Path, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_variant(Bundle.open(rounded_decoder), "fine", **limits)


def test_settings_of_no_use(rounded_decoder: Path) -> None:
    for settings in (Settings(max_tokens=1), Settings(new_tokens=0), Settings(new_tokens=2.5)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="must be an integer of at least"):
            measure_reference(Bundle.open(rounded_decoder), TEXT, settings)
    Gate().check("encoder")


def test_unknown_and_unrunnable_variants(rounded_decoder: Path, reference: Reference) -> None:
    bundle = Bundle.open(rounded_decoder)
    with pytest.raises(BundleError, match="no variant 'w4'"):
        measure_variant(bundle, "w4", reference=reference)
    variant = dataclasses.replace(bundle.variant("fine"), graphs={"tensorrt": bundle.graph("fine", "ort-cpu")})
    variants = {"fp32": bundle.variant("fp32"), "t": variant}
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, variants=variants))
    with pytest.raises(EngineUnavailableError):
        measure_variant(other, "t", reference=reference)


def test_a_bundle_without_a_tokenizer(rounded_decoder: Path) -> None:
    bundle = Bundle.open(rounded_decoder)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != "tokenizer.json"}
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, files=files))
    with pytest.raises(BundleError, match="no tokenizer.*--no-quality"):
        measure_variant(other, "fine")


def test_an_engine_that_breaks_meanwhile(
    rounded_decoder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ENGINES", (Shelf().engine("gpu", steps=5), *engines.ENGINES))
    with pytest.raises(EngineError, match="gpu broke while it was measured, and ort-cpu took over"):
        measure_variant(Bundle.open(rounded_decoder), "fine", reference=reference)
