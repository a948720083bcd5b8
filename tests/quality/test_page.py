from __future__ import annotations

import dataclasses

from accel.manifest import Quantization, QuantizedLayer
from accel.quality import Report, VariantReport, render_page
from tests.inspection.test_page import EVIL, Page
from tests.quality.samples import DECODER, decoder_report, encoder_report, quality, record


def test_every_part_of_a_decoder_s_report() -> None:
    page = Page(render_page(decoder_report()))
    text = " ".join(page.text)
    labels = [attributes["aria-label"] or "" for attributes in page.of("svg")]
    assert len(labels) == 6  # loss against size, agreement, two calls, two variants' layers
    assert any("w4g32: 82 MB, loss 0.0711" in label for label in labels)
    for words in ("−0.0858 to −0.0564", "fp16: no engine can run", "6.59 x", "2,822", "sum_i (d_i - n_i D)^2",
                  "208 x 4 bits, groups of 32; 3 x 8 bits"):  # fmt: skip
        assert words in text
    kept = [attributes for attributes in page.of("circle") if attributes["class"] == "kept"]
    assert len(kept) == 3
    assert len([attributes for attributes in page.of("rect") if attributes["class"] == "heat"]) == 2 * 211


def test_an_encoder_s_report() -> None:
    page = Page(render_page(encoder_report()))
    text = " ".join(page.text)
    assert "0.998710" in text and "0.99440 of 40 pairs" in text and "perplexity" not in text
    assert len(page.of("svg")) == 3


def test_nothing_is_loaded_and_nothing_runs() -> None:
    page = Page(render_page(decoder_report()))
    assert not page.of("script") and not page.of("link") and not page.of("img")
    assert not any("src" in attributes or "href" in attributes for _, attributes in page.tags)


def test_hostile_names_stay_text() -> None:
    layers = (QuantizedLayer(EVIL, 4, 32, 0.1), QuantizedLayer(f"a.{EVIL}.9.{EVIL}", 8, 0, 0.2))
    quantization = Quantization(EVIL, EVIL, EVIL, 5, layers, 10, 5)
    measured = quality(10, 10, 1, -0.1, 0.5, 0.5)
    phases = tuple(dataclasses.replace(item, name=EVIL) for item in measured.timings)
    measured = dataclasses.replace(
        measured, engine=EVIL, machine=EVIL, text=EVIL, text_sha256=EVIL, reference_engine=EVIL, timings=phases
    )
    variants = (
        VariantReport(EVIL, EVIL, (EVIL,), measured, quantization),
        VariantReport(EVIL, EVIL, (EVIL,), None, None, missing=EVIL),
    )
    arch = dataclasses.replace(DECODER, family=EVIL, architecture=EVIL)
    text = render_page(Report(EVIL, EVIL, EVIL, arch, variants)).replace("SURROGATE", "")
    text.encode()
    page = Page(text)
    assert not page.of("script") and not page.of("img") and "<script" not in text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert text.count("alert(1)") > 20


def test_sparse_reports_make_a_page() -> None:
    whole = decoder_report()
    bare = VariantReport("fp32", "float32", (), None, None, missing="no engine")
    empty = dataclasses.replace(record(4, 32, 0.1), layers=())
    for variants in ((bare,), (dataclasses.replace(bare, quantization=empty),), whole.variants[:1]):
        Page(render_page(dataclasses.replace(whole, variants=variants)))
    still = dataclasses.replace(record(4, 32, 0.0), layers=(QuantizedLayer("head", 4, 0, 0.0),))
    fp32 = dataclasses.replace(whole.variants[0], quantization=still)
    Page(render_page(dataclasses.replace(whole, variants=(fp32,))))


def test_losses_beyond_the_usual_are_drawn_inside() -> None:
    whole = decoder_report()
    worst = quality(1, 1, 1, -9.7, 0, 0)
    better = quality(540_000_000, 1, 1, 0.02, 1, 1)
    variants = (
        VariantReport("worst", "int4", (), worst, None),
        VariantReport("better than fp32", "int8", (), better, None),
    )
    page = Page(render_page(dataclasses.replace(whole, variants=(whole.variants[0], *variants))))
    for attributes in page.of("circle"):
        assert 0 <= float(attributes["cy"] or -1) <= 320 and 0 <= float(attributes["cx"] or -1) <= 980
