from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import BundleError, EngineError, InputError, QualityError, StorageError
from accel.quality import Gate, Report, render_page, render_text
from tests.quality.samples import decoder_report, encoder_report

Output = pytest.CaptureFixture[str]
OPTIONS: Any = {"threads": 1, "new_tokens": 4, "show_progress": False}
PASSAGES = [f"Passage {index} says that {index * 7} is a number, too." for index in range(12)]


@pytest.fixture
def copy(tmp_path: Path, rounded_decoder: Path) -> Path:
    return Path(shutil.copytree(rounded_decoder, tmp_path / "copy"))


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_measures_what_is_not_stored(rounded_decoder: Path) -> None:
    before = (rounded_decoder / "manifest.json").read_bytes()
    found = accel.report(rounded_decoder, text=PASSAGES, **OPTIONS)
    assert [item.name for item in found.variants] == ["fp32", "fine", "coarse"]
    assert all(item.measured and item.quality is not None and item.missing is None for item in found.variants)
    record = found.variant("coarse").quantization
    assert record is not None and record.layers[0].bits == 3 and 0 < record.layers[0].error < 1
    assert not found.saved and (rounded_decoder / "manifest.json").read_bytes() == before
    quality = found.variant("fine").quality
    assert quality is not None and quality.text == "given" and quality.likelihood is not None
    assert quality.likelihood.blocks == 12


def test_saves_and_reads_back(copy: Path) -> None:
    found = accel.report(copy, "fine", PASSAGES, save=True, **OPTIONS)
    assert found.saved and [item.name for item in found.variants] == ["fp32", "fine"]
    bundle = Bundle.open(copy, verify=True)
    assert bundle.variant("fine").quality == found.variant("fine").quality
    assert bundle.variant("fp32").quality == found.variant("fp32").quality and bundle.variant("coarse").quality is None
    again = accel.report(copy, ["fine"], **OPTIONS)
    assert not any(item.measured for item in again.variants) and not again.saved
    assert again.variant("fine").quality == found.variant("fine").quality
    afresh = accel.report(copy, "fine", measure=True, **OPTIONS)
    assert all(item.measured and item.quality and item.quality.text == "built-in" for item in afresh.variants)


def test_fp32_is_known_from_the_others(copy: Path) -> None:
    accel.report(copy, "fine", PASSAGES, save=True, **OPTIONS)
    path = copy / "manifest.json"
    plain = json.loads(path.read_text())
    plain["variants"]["fp32"]["quality"] = None
    path.write_text(json.dumps(plain))
    found = accel.report(copy, "fine", **OPTIONS)
    fp32, fine = found.variant("fp32").quality, found.variant("fine").quality
    assert not found.variants[0].measured and fp32 is not None and fine is not None and fine.likelihood is not None
    assert fp32.size == fine.reference_size and fp32.timings == fine.reference_timings and fp32.greedy is None
    assert fp32.likelihood is not None and fp32.likelihood.q == fine.likelihood.reference_q


def test_manifests_from_before_still_open(copy: Path) -> None:
    path = copy / "manifest.json"
    plain = json.loads(path.read_text())
    for variant in plain["variants"].values():
        assert variant.pop("quality") is None
        variant.pop("quantization")
    path.write_text(json.dumps(plain))
    assert Bundle.open(copy).variant("fine").quality is Bundle.open(copy).variant("fine").quantization is None
    plain["variants"]["fine"]["quality"] = {"engine": "x"}
    path.write_text(json.dumps(plain))
    with pytest.raises(BundleError, match=r"Missing key 'reference_engine'.*fine: quality"):
        Bundle.open(copy)


def test_a_variant_that_cannot_run_is_in_the_report(copy: Path, capsys: Output) -> None:
    path = copy / "manifest.json"
    plain = json.loads(path.read_text())
    plain["variants"]["fine"]["graphs"] = {"tensorrt": plain["variants"]["fine"]["graphs"]["ort-cpu"]}
    path.write_text(json.dumps(plain))
    found = accel.report(copy, "fine", PASSAGES, **OPTIONS)
    item = found.variant("fine")
    assert item.quality is None and item.missing is not None and "no engine can run" in item.missing
    found.hold(Gate())
    with pytest.raises(EngineError, match="fine was not measured"):
        found.hold(Gate(max_q_drop=0.1))
    assert "fine was not measured" in render_text(found)


def test_arguments_of_no_use(rounded_decoder: Path) -> None:
    with pytest.raises(BundleError, match="no variant 'fin'"):
        accel.report(rounded_decoder, "fin")
    wrong: Any = (({"variant": []}, "No variant"), ({"text": []}, "no text"), ({"max_tokens": 0}, "max_tokens"))
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            accel.report(rounded_decoder, **arguments)


def test_the_command(copy: Path, capsys: Output, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(PASSAGES))
    choices = ("--text", text, "--threads", 1, "--new-tokens", 4)
    assert run("report", copy, *choices, "--save") == 0
    printed = capsys.readouterr().out
    words = ("fine", "coarse", "perplexity", "95 %", "T_c", "in the manifest now", "text.txt")
    assert all(word in printed for word in words)
    assert run("report", copy, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    fine = next(item for item in found["variants"] if item["name"] == "fine")
    assert fine["quality"]["text"] == "text.txt" and fine["quality"]["likelihood"]["perplexity"] > 1
    assert fine["quality"]["byte_ratio"] == pytest.approx(1, abs=0.1) and not fine["measured"]
    assert run("report", copy, "--html", tmp_path / "page.html") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert run("report", copy, "--html", tmp_path / "no" / "page.html") == 1
    assert "page cannot be written" in capsys.readouterr().err


def test_what_cannot_be_written_is_told_before_the_measuring(
    copy: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr("accel.quality.collect.measure_reference", never)
    for path in (copy / "no" / "page.html", copy):
        assert run("report", copy, "--measure", "--html", path) == 1
        assert "The page cannot be written: it" in capsys.readouterr().err
    failure = StorageError("The file system is read-only")
    monkeypatch.setattr("accel.bundle_extension.TemporarySibling.create", lambda self: (_ for _ in ()).throw(failure))
    with pytest.raises(StorageError, match="read-only"):
        accel.report(copy, text=PASSAGES, save=True, **OPTIONS)


def test_limits_make_the_command_fail(copy: Path, capsys: Output) -> None:
    accel.report(copy, text=PASSAGES, save=True, **OPTIONS)
    assert run("report", copy, "--variant", "fine", "--max-q-drop", 0.5) == 0
    capsys.readouterr()
    assert run("report", copy, "--max-q-drop", 0.001) == 1
    printed = capsys.readouterr()
    assert "coarse" in printed.out and "0.001 is allowed" in printed.err
    assert run("report", copy, "--min-cosine", 0.9) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "min_cosine is for encoders" in printed.err  # before anything is measured


def test_text_of_reports_by_hand() -> None:
    text = render_text(decoder_report())
    assert "−0.0711 ± 0.0147" in text and "89.30 %" in text and "42.0 %" in text
    assert "208 x 4 bits, groups of 32; 3 x 8 bits, groups of 32" in text
    assert "fp16 was not measured: no engine" in text and "logit error" not in text
    lines = next(line for line in text.splitlines() if line.startswith("│ w4g32 ")).split("│")
    assert [cell.strip() for cell in lines[3:7]] == ["82 MB", "6.59", "0.970", "4.88"]
    text = render_text(encoder_report())
    assert "0.99871" in text and "0.99440" in text and "perplexity" not in text


@pytest.mark.parametrize("whole", [decoder_report(), encoder_report()], ids=["decoder", "encoder"])
def test_figures_of_different_texts_say_so(whole: Report) -> None:
    """fp32's Q on one text beside a variant's on another would be read as a loss."""
    last = whole.variants[2]
    assert last.quality is not None
    moved = dataclasses.replace(last.quality, text="mine.txt", text_sha256="ab" * 32, machine="Another CPU")
    if moved.likelihood is not None:
        moved = dataclasses.replace(moved, likelihood=dataclasses.replace(moved.likelihood, reference_q=-2.5))
    variants = (*whole.variants[:2], dataclasses.replace(last, quality=moved), *whole.variants[3:])
    mixed = dataclasses.replace(whole, variants=variants)
    for render in (render_text, render_page):
        before, after = render(whole), " ".join(render(mixed).split())
        assert "text measured" not in before and "mine.txt" not in before
        assert "text measured" in after and "mine.txt ababab" in after and "built-in d" in after
        assert f"{last.name}: text mine.txt (sha256 ababab" in after and "fp32: text built-in" not in after
        assert ("−2.5000" in after) == (whole.arch.kind == "decoder")
    assert "AMD EPYC and Another CPU" in render_page(mixed)


def test_json_of_a_hopeless_variant_holds_no_infinity() -> None:
    report = decoder_report()
    worst = report.variants[1]
    assert worst.quality is not None and worst.quality.likelihood is not None
    likelihood = dataclasses.replace(worst.quality.likelihood, q=-800.0)
    worst = dataclasses.replace(worst, quality=dataclasses.replace(worst.quality, likelihood=likelihood))
    changed = dataclasses.replace(report, variants=(report.variants[0], worst))
    plain = json.loads(changed.to_json())["variants"][1]["quality"]["likelihood"]
    assert plain["perplexity"] is None and plain["q"] == -800
    assert "inf" in render_text(changed)
    with pytest.raises(QualityError, match="w8a8-dyn loses 0.0043"):
        changed.hold(Gate(max_q_drop=0.001))
