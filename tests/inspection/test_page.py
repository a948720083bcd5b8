from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.inspection import inspect, render_page, render_text
from accel.manifest import ParityResult, PassReport
from accel.spec import TensorSpec
from tests.inspection import decoder_bundle as made

EVIL = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&SURROGATE\x1b"
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Collects the elements; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def hostile(path: Path) -> Bundle:
    """Every free string of the manifest is an attack."""
    passes = (PassReport(EVIL, 10, 5, {EVIL: 3}, (EVIL,)),)
    entry = made.entry("ort-cpu", passes)
    entry = dataclasses.replace(entry, inputs=(TensorSpec(EVIL, EVIL, (EVIL,)),), attention_nodes=(EVIL, EVIL))
    variant = made.manifest().variants["fp32"]
    variant = dataclasses.replace(variant, dtype=EVIL, graphs={EVIL: entry})
    nodes = made.nodes()
    nodes[0].op_type = nodes[0].domain = EVIL
    parameters = {EVIL: made.manifest().parameters["model.norm.weight"]}
    return made.write(
        path,
        nodes,
        source=EVIL,
        accel_version=EVIL,
        arch=dataclasses.replace(made.ARCH, family=EVIL, architecture=EVIL),
        variants={EVIL: variant},
        versions={EVIL: EVIL},
        parity={EVIL: ParityResult(EVIL, 1, 1.0, 1.0, 0.1)},
        parameters=parameters,
        tied={EVIL: EVIL},
    )


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    path = hostile(tmp_path / "b").path / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace("SURROGATE", "\\ud800"), encoding="utf-8")
    found = inspect(Bundle.open(path.parent))
    assert "\ud800" in found.source
    text = render_page(found)
    text.encode("utf-8")  # a lone surrogate could not be written
    page = Page(text)
    assert not page.of("script") and not page.of("img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert text.count("alert(1)") > 40 and "<script" not in text
    assert all(char.isprintable() or char == "\n" for char in render_text(found))


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    text = render_page(inspect(made.write(tmp_path / "b")))
    page = Page(text)
    for attribute in ("src", "href", "xlink:href", "action", "data"):
        assert not any(attribute in attributes for _, attributes in page.tags)
    assert "url(" not in text and "@import" not in text and not page.of("link") and not page.of("script")
    policy = next(item for item in page.of("meta") if item.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] is not None and policy["content"].startswith("default-src 'none'")
    assert "prefers-color-scheme:dark" in text


def test_pictures_speak_to_screen_readers(tmp_path: Path) -> None:
    page = Page(render_page(inspect(made.write(tmp_path / "b"))))
    pictures = page.of("svg")
    labels = [item["aria-label"] or "" for item in pictures]
    assert all(item["role"] == "img" for item in pictures)
    assert labels[0] == "Nodes per pass, fp32/ort-cpu. From 100 traced nodes to 12 in 3 passes"
    assert "layers 0: 4 heads over 2, sees causal, last 16" in labels[1]
    assert any(label.startswith("Weights of fp32 by part. attention 60.4 %") for label in labels)
    assert any(label.startswith("Cache growth. 256 bytes per token") for label in labels)
    assert any("fp32/ort-cpu: 2.0e-06, limit 1e-04" in label for label in labels)
    assert len(pictures) == 7  # passes, layers, operators twice, weights, cache, parity
    assert page.tags[0] == ("html", {"lang": "en"})


def test_the_tables_hold_the_numbers(tmp_path: Path) -> None:
    page = Page(render_page(inspect(made.write(tmp_path / "b"))))
    for expected in ("1,600", "6,784", "256 B", "524,288", "2.00e-06", "40 of 41", "past.{0-1}.key", "causal, last 16"):
        assert expected in page.text or any(expected in piece for piece in page.text), expected


@pytest.mark.parametrize("case", ["no graphs", "no weights", "no layers", "zero sizes"])
def test_sparse_bundles_make_a_page(tmp_path: Path, case: str) -> None:
    variant = made.manifest().variants["fp32"]
    changes: dict[str, object] = {
        "no graphs": {"variants": {"fp32": dataclasses.replace(variant, graphs={})}},
        "no weights": {"variants": {}, "parameters": {}, "tied": {}, "parity": {}},
        "no layers": {"arch": dataclasses.replace(made.ARCH, layers=())},
        "zero sizes": {
            "parity": {"x": ParityResult("r", 0, 0.0, 0.0, 0.0)},
            "variants": {
                "fp32": dataclasses.replace(
                    variant, graphs={"ort-cpu": made.entry("ort-cpu", (PassReport("p", 0, 0),))}
                )
            },
        },
    }
    found = inspect(made.write(tmp_path / "b", **changes[case]))  # type: ignore[arg-type]
    Page(render_page(found))
    assert render_text(found)


def test_real_bundles_make_pages(tiny_decoder_bundle: Path, minilm_bundle: Path) -> None:
    for path in (tiny_decoder_bundle, minilm_bundle):
        found = inspect(Bundle.open(path))
        page = Page(render_page(found))
        assert f"parameters ({found.arch.parameters:,})" in page.text
        assert len(page.of("svg")) >= 6
