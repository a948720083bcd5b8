"""Options of a new variant: each counts, or is refused before anything is made."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import accel
from accel import capabilities
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import DependencyError, InputError, QualityError
from accel.graph.lowering.versions import VERSIONS
from accel.manifest import Quantization
from accel.quality import Report, VariantReport, render_page, render_text, save_quality
from accel.schema import from_dict, to_dict
from accel.scheme import parse_scheme
from accel.variant_targets import TARGETS, check_target
from accel.variants import add_variant
from tests.quality.samples import DECODER
from tests.test_bundle_extension import content


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder"))


REFUSED: list[tuple[str, str | None, dict[str, Any], str]] = [
    ("kv8", None, {"algorithm": "gptq"}, "^kv8 has no integer weights to choose"),
    ("kv4", "cuda", {}, "cuda engine cannot run .* as kv4: its caches are floats, .*or int8, not int4.*ort-cpu"),
    ("w8a8+kv8", "cuda", {}, "the cuda engine cannot run this decoder as w8a8.kv8: its kernels take floats"),
    ("fp16+kv8", "ort-cuda", {}, "Runtime CUDA cannot run this decoder as fp16.kv8: its caches are floats.*: cuda"),
    ("fp16+kv8", "tensorrt", {}, "TensorRT cannot run .*: its cache layer takes no integers .*: cuda"),
    ("fp16+kv8", "ort-cpu", {}, "ONNX Runtime CPU cannot run this decoder as fp16.kv8: .*: cuda"),
    ("fp16+kv8", None, {"max_q_drop": 1.0}, "fp16.kv8 for the cuda engine is not measured here"),
    ("w4g32", "cuda", {"max_q_drop": 1.0}, "max_q_drop needs a measurement, and w4g32 for the cuda engine is not"),
    ("w4g32", "tensorrt", {"max_q_drop": 1.0}, "w4g32 for TensorRT is not measured here.*ort-cpu are measured"),
    ("fp16", None, {"max_q_drop": 1.0}, "fp16 for TensorRT is not measured here"),
    ("w8g32", None, {"max_q_drop": 1.0, "measure": False}, "max_q_drop needs .*measuring is off"),
    ("w8g32", None, {"text": ["A text.", "Another."], "measure": False}, "text needs .*measuring is off"),
    ("fp16", None, {"algorithm": "gptq"}, "fp16 has no integer weights to choose, and takes no algorithm"),
    ("bf16", "cuda", {"keep": {"*": 8}}, "bf16 .*takes no keep"),
    ("fp16", None, {"calibration": ["text"]}, "fp16 .*takes no calibration"),
    ("kv8", None, {"head_bits": 8}, "^kv8 .*takes no head_bits"),
    ("fp8", None, {"max_bytes": "1M"}, "fp8 .*takes no max_bytes"),
    ("fp16", None, {"max_layer_error": 0.1}, "fp16 .*takes no max_layer_error"),
    ("kv8", None, {"q_budget": 0.1}, "kv8 .*takes no q_budget"),
    ("fp8+kv8", None, {}, "no target runs this decoder as fp8\\+kv8 .*TensorRT: its cache layer takes no integers"),
    ("fp16+kvfp8", "ort-cuda", {}, "ONNX Runtime CUDA cannot run .*: its caches are floats of 16 bits .*: cuda"),
    ("w4g32+kvfp8", "ort-cpu", {}, "cannot run .* as w4g32.kvfp8: its caches are fp32, int8 or int4 .*: cuda"),
    ("kvfp8", "tensorrt", {}, "TensorRT cannot run this decoder as kvfp8: its cache layer takes no 8-bit floats"),
    ("fp16+kv4", None, {}, "no target runs this decoder as fp16\\+kv4 .*cuda engine: its caches are floats, .*or int8"),
    ("kv8", "cuda", {}, "cannot run this decoder as kv8: .*it computes in fp16 or bf16: fp16.kv8, bf16.kv8"),
    ("kvfp8", None, {}, "no target runs this decoder as kvfp8 .*fp16.kvfp8, bf16.kvfp8"),
]


@pytest.mark.parametrize(("variant", "target", "options", "said"), REFUSED)
def test_what_would_be_ignored_is_refused(
    decoder: Path, variant: str, target: str | None, options: dict[str, Any], said: str
) -> None:
    before = content(decoder)
    with pytest.raises(InputError, match=said):
        add_variant(decoder, variant, target=target, **options)
    assert content(decoder) == before


@pytest.mark.parametrize(("cache", "remedy"), [("kv8", "; kv8 runs on ort-cpu"), ("kvfp8", "")])
def test_a_cache_alone_for_a_named_target(decoder: Path, cache: str, remedy: str) -> None:
    """The caller's target counts: the command is for that one."""
    with pytest.raises(InputError) as caught:
        add_variant(decoder, cache, target="cuda")
    command = f"accel quantize {Bundle.open(decoder).path} --variant fp16+{cache} --target cuda"
    assert caught.value.remedy == command + remedy


@pytest.mark.parametrize(
    ("asked", "target", "remedy"),
    [
        ("kvfp8", "tensorrt", "cuda runs fp16+kvfp8: {} fp16+kvfp8 --target cuda"),
        ("kvfp8", "ort-cpu", "cuda runs fp16+kvfp8: {} fp16+kvfp8 --target cuda"),
        ("kv8", "tensorrt", "Targets that can: ort-cpu; cuda runs fp16+kv8: {} fp16+kv8 --target cuda"),
        ("fp16+kv4", "cuda", "ort-cpu runs fp32+kv4: {} fp32+kv4 --target ort-cpu"),
        ("fp16+kv8", "tensorrt", "Targets that can: cuda"),
    ],
)
def test_a_cache_that_another_target_keeps(decoder: Path, asked: str, target: str, remedy: str) -> None:
    """Beside other weights, if need be: the command is for that target, and what it names is not refused there."""
    with pytest.raises(InputError) as caught:
        add_variant(decoder, asked, target=target)
    assert caught.value.remedy == remedy.format(f"accel quantize {Bundle.open(decoder).path} --variant")
    with pytest.raises(InputError, match="cuda runs fp16.kvfp8: accel .* --variant fp16.kvfp8 --target cuda"):
        add_variant(decoder, "kvfp8")
    for name, other in re.findall(r"--variant (\S+) --target (\S+)", caught.value.remedy):
        check_target(Bundle.open(decoder).manifest.arch, parse_scheme(name), TARGETS[other])


ONE_REASON = [
    ("w4g32+kv8", r"Take w4g32, which runs on ort-cpu, tensorrt, cuda, ort-cuda"),
    ("fp16+kvfp8", r"Take fp16, which runs on tensorrt, cuda, ort-cuda"),
    ("kv4", r"Take a variant that rounds weights, or none"),
]


@pytest.mark.parametrize(("variant", "remedy"), ONE_REASON)
def test_an_encoder_has_no_cache_whatever_the_target(minilm_bundle: Path, variant: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        add_variant(minilm_bundle, variant)
    what = f"no target runs this encoder as {variant} (an encoder has no cache)"
    assert (caught.value.what, caught.value.remedy) == (what, remedy)
    for target in TARGETS.values():
        with pytest.raises(InputError) as caught:
            add_variant(minilm_bundle, variant, target=target.name)
        what = f"{target.title} cannot run this encoder as {variant}: an encoder has no cache"
        assert (caught.value.what, caught.value.remedy) == (what, remedy)


def test_budgets_of_quality_keep_layers_finer(decoder: Path) -> None:
    """What is above a layer's error is raised; for Q as few layers as that takes."""
    plain = {"algorithm": "rtn", "head_bits": 4, "measure": False, "check": False}
    errors = [layer.error for layer in record(add_variant(decoder, "w4g32", **plain), "w4g32")]
    limit = sorted(errors)[len(errors) // 2]
    by_layer = record(add_variant(decoder, "w4g64", max_layer_error=limit, **plain), "w4g64")
    assert max(layer.error for layer in by_layer) <= limit and 8 in {layer.bits for layer in by_layer}
    tight, loose = "w4g128", "w4g128+kv8"
    raised = [layer.bits for layer in record(add_variant(decoder, tight, q_budget=1e-6, **plain), tight)]
    left = [layer.bits for layer in record(add_variant(decoder, loose, q_budget=50.0, **plain), loose)]
    assert raised.count(4) < left.count(4)


def test_a_budget_of_q_is_for_decoders(minilm_bundle: Path) -> None:
    with pytest.raises(InputError, match="an encoder does not have .*max_layer_error"):
        add_variant(minilm_bundle, "w4g32", q_budget=0.1)


def record(bundle: Bundle, variant: str) -> Any:
    quantization = bundle.variant(variant).quantization
    assert quantization is not None
    return quantization.layers


def test_the_command_checks_all_before_the_first(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(decoder)
    plain = ["quantize", str(decoder), "--variant", "w8g32", "--no-parity"]
    for more, said in (
        (["--variant", "fp16", "--algorithm", "rtn"], "fp16 has no integer weights"),
        (["--variant", "fp16+kv4"], "no target runs this decoder as fp16+kv4"),
        (["--variant", "fp16+kv4"], f"accel quantize {decoder.resolve()} --variant fp32+kv4 --target ort-cpu"),
        (["--target", "ort-cpu", "--target", "cuda", "--max-q-drop", "1"], "for the cuda engine is not measured here"),
        (["--no-quality", "--max-q-drop", "1"], "measuring is off"),
    ):
        assert main([*plain, *more]) == 1 and said in capsys.readouterr().err
        assert content(decoder) == before


def test_a_variant_that_is_there_is_held_too(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = add_variant(decoder, "w8g32", algorithm="rtn", check=False)
    quality = bundle.variant("w8g32").quality
    assert quality is not None and quality.likelihood is not None
    worse = dataclasses.replace(quality, likelihood=dataclasses.replace(quality.likelihood, difference=-0.5))
    save_quality(bundle, {"w8g32": worse})
    before = content(decoder)
    with pytest.raises(QualityError, match=r"loses 0\.5000 of Q .*It was in the bundle already, and stays there"):
        add_variant(decoder, "w8g32", max_q_drop=0.1)
    assert main(["quantize", str(decoder), "--variant", "w8g32", "--max-q-drop", "0.1"]) == 1
    assert "0.1 is allowed" in capsys.readouterr().err
    add_variant(decoder, "w8g32", max_q_drop=0.6)
    assert main(["quantize", str(decoder), "--variant", "w8g32", "--algorithm", "gptq"]) == 0
    said = "w8g32/ort-cpu was there already and stays as it was made"
    told, drop = capsys.readouterr().out, f"accel quantize {Bundle.open(decoder).path} --drop w8g32"
    assert f"{said}; not applied: --algorithm. To make it otherwise, drop it first: {drop}" in told
    assert content(decoder) == before
    plain = ["quantize", str(decoder), "--variant", "w8g32", "--algorithm", "rtn"]
    assert main(plain) == 0  # it was made so
    assert f"{said}\n" in capsys.readouterr().out
    text = decoder.parent / "text"
    text.write_text("Some words.\n\nA few more.\n")
    assert main([*plain, "--keep", "*=8", "--head-bits", "8", "--text", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["known"], found["added"]) == (["w8g32/ort-cpu"], {})
    assert found["not_applied"] == {"w8g32/ort-cpu": ["--head-bits", "--text", "--keep"]}
    assert content(decoder) == before


def test_what_is_advised_to_be_dropped_costs_no_other_graph(
    decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in ("ort-cpu", "cuda"):
        add_variant(decoder, "w8g32", target=target, algorithm="rtn", check=False, measure=False)
    assert main(["quantize", str(decoder), "--variant", "w8g32", "--head-bits", "8"]) == 0
    advised = f"drop it first: accel quantize {decoder.resolve()} --drop w8g32 --target ort-cpu (what it has for cuda"
    assert advised in capsys.readouterr().out


def test_a_variant_without_a_record_is_measured_for_its_gate(decoder: Path) -> None:
    add_variant(decoder, "w4g32", algorithm="rtn", check=False, measure=False)
    text = ["Some words to measure on.", "And a few more of them.", "The end of it."]
    with pytest.raises(QualityError, match="It was in the bundle already"):  # Q of random weights falls or rises
        for number in range(8):
            add_variant(decoder, "w4g32", text=[f"{number * 7} {passage}" for passage in text], max_q_drop=0.0)
    assert Bundle.open(decoder).variant("w4g32").quality is None


def test_the_record_is_of_the_integers_that_were_measured(decoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = add_variant(decoder, "w8g32", algorithm="rtn", check=False).variant("w8g32")
    assert first.quality is not None and first.quantization is not None
    same = add_variant(decoder, "w8g32", target="cuda", algorithm="rtn", check=False).variant("w8g32")
    assert same.quantization == first.quantization and not caplog.records
    other = add_variant(decoder, "w8g32", target="tensorrt", algorithm="gptq", check=False).variant("w8g32")
    assert set(other.graphs) == {"ort-cpu", "cuda", "tensorrt"}
    assert (other.quantization, other.quality) == (first.quantization, first.quality)
    told = "w8g32 for TensorRT has other integers than its graphs for other targets, whose record and figures stay: "
    assert told + "gptq in place of rtn" in caplog.text


def test_a_record_of_former_integers_goes(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = add_variant(decoder, "w8g32", algorithm="rtn", check=False).variant("w8g32")
    monkeypatch.setitem(VERSIONS, "ort-cpu", 98)
    same = add_variant(decoder, "w8g32", algorithm="rtn", check=False, measure=False).variant("w8g32")
    assert same.quality == first.quality is not None
    monkeypatch.setitem(VERSIONS, "ort-cpu", 99)
    made = add_variant(decoder, "w8g32", algorithm="gptq", check=False, measure=False).variant("w8g32")
    assert made.quantization is not None and made.quantization.algorithm == "gptq" and made.quality is None


def test_what_is_measured_is_the_new_graph(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant may have graphs that another engine here would take first."""
    from accel.quality import measure

    asked = []
    real = measure.open_model

    def note(bundle: Bundle, device: str, engine: str, variant: str, options: Any) -> Any:
        asked.append((variant, engine))
        return real(bundle, device, engine, variant, options)

    monkeypatch.setattr(measure, "open_model", note)
    accel.add_variant(decoder, "w8g32", algorithm="rtn", check=False)
    assert asked == [("fp32", "ort-cpu"), ("w8g32", "ort-cpu")]


def test_layers_that_stay_float_are_reported(decoder: Path) -> None:
    plain: dict[str, Any] = {"algorithm": "rtn", "check": False, "measure": False}
    record = add_variant(decoder, "w8g32", keep={"model.layers.0.*": 32}, **plain).variant("w8g32").quantization
    assert record is not None
    names = [name for name, reason in record.kept.items() if reason == "asked for"]
    assert len(names) == 7 and all(name.startswith("model.layers.0.") for name in names)
    assert not set(record.kept) & {layer.name for layer in record.layers}
    item = VariantReport("w8g32", "float32", (), None, record)
    found = Report("bundle", "source", "0", DECODER, (item,))
    assert "; 7 in float; " in render_text(found)
    assert f"in float (asked for): {', '.join(names[:6])} and 1 more" in " ".join(render_text(found).split())
    assert all(f"<td>{name}</td><td>asked for</td>" in render_page(found) for name in names)
    assert json.loads(found.to_json())["variants"][0]["quantization"]["kept"] == record.kept
    older = {key: value for key, value in to_dict(record).items() if key != "kept"}
    assert from_dict(Quantization, older, "manifest.json") == dataclasses.replace(record, kept={})


@pytest.mark.parametrize(
    ("variant", "target", "check", "missing"),
    [
        ("fp16", "cuda", True, ("onnxscript",)),  # what the extra cuda lacks
        ("fp16", "ort-cuda", True, ("onnx_ir", "onnxscript", "torch")),  # cpu
        ("fp16", "tensorrt", True, ("torch",)),
        ("fp16", "tensorrt", False, ("onnxruntime",)),
        ("w8g32", "ort-cpu", False, ("torch",)),
    ],
)
def test_missing_packages_are_named_before_anything_is_made(
    decoder: Path, variant: str, target: str, check: bool, missing: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = content(decoder)
    for name in (*missing, "transformers"):  # that one is never needed
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match=f"not installed: {', '.join(missing)}. .*accelrt.export") as caught:
        add_variant(decoder, variant, target=target, check=check)
    command = ["quantize", str(decoder), "--variant", variant, "--target", target]
    assert main([*command, *["--no-parity"] * (not check)]) == 1
    printed = capsys.readouterr().err
    assert caught.value.what in printed and "Lowering" not in printed and content(decoder) == before


def test_a_missing_package_of_the_last_target_stops_the_first(
    decoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(decoder)
    monkeypatch.setitem(sys.modules, "torch", None)
    command = ["quantize", str(decoder), "--variant", "fp16", "--variant", "w8g32", "--target", "cuda", "--no-parity"]
    assert main(command) == 1 and "Adding w8g32 for the cuda engine needs" in capsys.readouterr().err
    assert content(decoder) == before


def test_missing_packages_are_named_one_by_one_beside_onnxruntime_gpu(
    decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra would put onnxruntime over its files."""
    monkeypatch.setattr(capabilities, "version_of", {"onnxruntime-gpu": "1.32.0"}.get)
    for name in ("onnx_ir", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match="Install them: pip install onnx-ir onnxscript$"):
        add_variant(decoder, "fp16", target="cuda")


def test_packages_that_a_variant_can_do_without(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "bf16" in add_variant(decoder, "bf16", target="cuda", check=False).manifest.variants
