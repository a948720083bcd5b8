"""Variants with integers on ONNX Runtime CPU: added, compared, measured, refused, and run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import accel_cpu
import numpy as np
import pytest

import accel
from accel import variant_checks
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import EngineUnavailableError, InputError, ParityError, QualityError
from accel.graph.lowering.tensorrt import quantized
from accel.graph.lowering.versions import VERSIONS
from accel.manifest import ParityResult
from accel.variants import add_variant, is_current
from tests.test_bundle_extension import content

VARIANTS = ("w8a8-dyn", "w8a8", "w8g32", "w4g32+kv8", "kv8", "fp32+kv4")
PROMPT = "The first few words of a text, and then some more"


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_added_and_runs(decoder: Path, variant: str) -> None:
    before = content(decoder)
    bundle = add_variant(decoder, variant)
    name = "fp32+kv8" if variant == "kv8" else variant
    after = content(bundle.path)
    assert all(after[key] == data for key, data in before.items() if key != "manifest.json")
    found = bundle.variant(name)
    assert is_current(bundle, name, "ort-cpu") and found.quality is not None
    assert (found.quantization is not None) == ("w" in name)
    parity = bundle.manifest.parity[f"{name}/ort-cpu"]
    assert 0 < parity.max_rel_error < parity.limit
    likelihood = found.quality.likelihood
    assert likelihood is not None and abs(likelihood.difference) < 0.5 and likelihood.tokens > 1000
    smaller = found.quality.reference_size.bytes / found.quality.size.bytes
    assert smaller > 2 if "w" in name else smaller > 0.95
    with accel.load(decoder, variant=name) as model, accel.load(decoder) as plain:
        assert model.engine.name == "ort-cpu" and model.engine.variant == name
        assert plain.engine.variant == "fp32"  # what costs quality runs when it is asked for
        result = model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=[])
        both = model.generate([PROMPT, PROMPT[:9]], max_new_tokens=12, do_sample=False, eos_token_id=[])
        assert both[0].ids == result.ids and len(result.ids) == 12
        scores = np.array(model.score(PROMPT)) - np.array(plain.score(PROMPT))
        assert 0 < np.abs(scores).max() < 2


def test_two_copies_get_the_same_bytes(decoder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(decoder, tmp_path / "other"))
    for folder in (decoder, other):
        add_variant(folder, "w4g32", algorithm="gptq", check=False, measure=False)
    assert content(decoder) == content(other)


def test_a_gate_refuses_and_writes_nothing(
    minilm_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(minilm_bundle, tmp_path / "minilm"))
    before = content(folder)
    with pytest.raises(QualityError, match="mean cosine of .* to those of fp32") as caught:
        add_variant(folder, "w4g128", algorithm="rtn", check=False, min_cosine=0.9999)
    assert caught.value.value < caught.value.limit == 0.9999 and caught.value.where == str(folder)
    assert content(folder) == before and not list(folder.glob(".*"))
    command = ["quantize", str(folder), "--variant", "w4g128", "--algorithm", "rtn", "--no-parity", "--min-cosine"]
    assert main([*command, "0.9999", "--target", "ort-cpu"]) == 1 and "mean cosine" in capsys.readouterr().err
    assert content(folder) == before
    assert main([*command, "0.5", "--target", "ort-cpu"]) == 0
    assert "x smaller, mean cosine to fp32 0.9" in capsys.readouterr().out


def test_wrong_kernels_are_noticed(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = content(decoder), accel_cpu.pack_scales
    monkeypatch.setattr(accel_cpu, "pack_scales", lambda scales, size: 2 * real(scales, size))
    with pytest.raises(ParityError, match="differs from PyTorch on the same integers"):
        add_variant(decoder, "w8g32", algorithm="rtn", measure=False)
    assert content(decoder) == before and not list(decoder.glob(".*"))


def test_what_a_target_cannot_run_is_refused(decoder: Path, minilm_bundle: Path) -> None:
    with pytest.raises(InputError, match="ONNX Runtime CPU cannot run this decoder as fp16.*tensorrt"):
        add_variant(decoder, "fp16", target="ort-cpu")
    with pytest.raises(InputError, match="cannot run this encoder as kv8: .*no cache"):
        add_variant(minilm_bundle, "kv8", target="ort-cpu")
    with pytest.raises(InputError, match="min_cosine is for encoders"):
        add_variant(decoder, "w8g32", min_cosine=0.9)
    with pytest.raises(InputError, match="calibration data is empty"):
        add_variant(decoder, "w4g32", calibration=[])


def test_an_encoder_within_its_gate(minilm_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minilm_bundle, tmp_path / "minilm"))
    bundle = add_variant(folder, "w8g128", algorithm="rtn", min_cosine=0.997)
    quality = bundle.variant("w8g128").quality
    assert quality is not None and quality.encoder is not None
    assert quality.encoder.cosine_mean >= 0.997 and (quality.encoder.rank_correlation or 0) >= 0.99
    with accel.load(folder, variant="w8g128") as small, accel.load(folder) as plain:
        texts = ["A man is eating food.", "Someone has a meal.", "The sky over the harbour turned grey."]
        cosine = (small.embed(texts) * plain.embed(texts)).sum(1)
    assert 0.995 < cosine.min() < 0.999999


def test_without_the_library(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_variant(decoder, "w8g32", algorithm="rtn", check=False, measure=False)
    monkeypatch.setattr(accel_cpu, "unavailable_reason", lambda: "The library was never compiled")
    with pytest.raises(EngineUnavailableError, match="The library was never compiled"):
        accel.load(decoder, variant="w8g32", engine="ort-cpu")
    with accel.load(decoder) as plain:
        assert plain.engine.variant == "fp32"


def test_outdated_integers_are_made_anew(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = add_variant(decoder, "w8a8-dyn", algorithm="rtn", check=False, measure=False)
    monkeypatch.setitem(VERSIONS, "ort-cpu", 99)
    assert not is_current(first, "w8a8-dyn", "ort-cpu")
    bundle = add_variant(decoder, "w8a8-dyn", algorithm="rtn", check=False, measure=False)
    assert bundle.graph("w8a8-dyn", "ort-cpu").lowering == 99
    assert bundle.graph("w8a8-dyn", "ort-cpu").file != first.graph("w8a8-dyn", "ort-cpu").file
    assert dataclasses.replace(Bundle.open(decoder, verify=True).manifest) == bundle.manifest


@pytest.mark.parametrize("target", ["tensorrt", "cuda", "ort-cuda"])
def test_a_model_that_amplifies_roundings_is_compared_in_fp32(
    decoder: Path, target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its fp16 loses more than it may here, as at some token of some models; the graph is no worse for it."""
    monkeypatch.setitem(variant_checks.LIMITS, "fp16", 1e-7)
    with caplog.at_level("WARNING", "accel"):
        bundle = add_variant(decoder, "w4g32", target=target, algorithm="rtn", measure=False)
    parity = bundle.manifest.parity[f"w4g32/{target}"]
    assert 1e-7 < parity.max_rel_error < parity.limit == variant_checks.INTEGERS, "what is recorded is its own"
    assert "w4g32: the same graph in fp32 is right" in caplog.text and "amplifies fp16's roundings" in caplog.text


def test_what_is_wrong_by_little_is_no_rounding(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = quantized._integers

    def spoiled(name: str, tensor: Any, table: bool) -> Any:
        return right(name, type(tensor)(tensor.values, 1.02 * tensor.scales, tensor.bits, tensor.group), table)

    monkeypatch.setattr(quantized, "_integers", spoiled)
    monkeypatch.setitem(variant_checks.LIMITS, "fp16", 1e-7)
    with pytest.raises(ParityError, match=r"w4g32 graph .*the graph is wrong") as caught:
        add_variant(decoder, "w4g32", target="tensorrt", algorithm="rtn", measure=False)
    assert "the limit 1.0e-03" in str(caught.value.__cause__), "in fp32"


def test_what_a_later_case_gives_counts(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case above the limit ends a comparison: another one may give no number at all."""
    limits: list[float] = []

    def compare(*arguments: Any) -> ParityResult:
        limits.append(arguments[4])
        error = ParityError("The w4g32 graph differs")
        error.value = 0.06 if len(limits) == 1 else float("inf")
        raise error

    monkeypatch.setattr(variant_checks, "_compare_integers", compare)
    with pytest.raises(ParityError) as caught:
        add_variant(decoder, "w4g32", target="cuda", algorithm="rtn", measure=False)
    assert caught.value.value == float("inf")
    assert limits == [2 * variant_checks.LIMITS["fp16"], variant_checks.INTEGERS]
