from __future__ import annotations

import dataclasses
from pathlib import Path

from accel.inspection import inspect, render_text
from accel.manifest import PassReport
from tests.inspection import decoder_bundle as made


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_every_section(tmp_path: Path) -> None:
    lines = rows(render_text(inspect(made.write(tmp_path / "b"))))
    for expected in (
        "source models/tiny",
        "architecture LlamaForCausalLM (llama, decoder)",
        "parameters 1,600",
        "tied lm_head.weight is model.embed_tokens.weight",
        "linear 100 80 4",
        "as canonical 100 30",
        "attention 30 12 GroupQueryAttention 2, packed_qkv 1 one layer unpacked",
        "0 com.microsoft::GroupQueryAttention 4/2 x 8 causal, last 16 none 0.5 inside yes",
        "1 com.microsoft::GroupQueryAttention 4/2 x 8 causal 30 0.5 outside no",
        "com.microsoft::GroupQueryAttention 2",
        "past.{0-1}.key float32 [B, 2, C, 8]",
        "Weights fp32: fp32.weights, 6,848 bytes (64 unused)",
        "float32 9 1,696 6,784 100.0 %",
        "attention 4 1,024 4,096 60.4 %",
        "Cache: float32, 256 bytes per token of a row",
        "0-1 [rows, 2, capacity, 8]",
        "2,048 524,288 524 kB",
        "fp32/ort-cpu torch eager fp32 3 2.00e-06 1e-04 1.00e-05 40 of 41",
        "torch 2.13.0",
    ):
        assert expected in lines, expected
    assert any(line.startswith("fp32.weights 6,848 ") for line in lines)
    assert "Warnings" not in lines and "Not shown" not in lines


def test_warnings_are_shown(tmp_path: Path) -> None:
    lines = rows(render_text(inspect(made.write(tmp_path / "b", made.nodes()[:-1], parity={}))))
    assert "Warnings" in lines and "Parity: not checked at export" in lines
    assert "- fp32/ort-cpu: the graph has no attention node 'layers.1.attention' (layer 1)" in lines


def test_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\r\u202e"
    found = inspect(
        made.write(
            tmp_path / "b",
            source=evil,
            versions={evil: evil},
            tied={evil: "model.norm.weight"},
            parity={evil: made.PARITY},
            variants={evil: made.manifest().variants["fp32"]},
        )
    )
    text = render_text(found)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\x1b]0;owned" in text


def test_notes_of_a_pass_are_shown(tmp_path: Path) -> None:
    passes = (PassReport("linear", 5, 4, {"linear": 1}, ("first note", "second")),)
    variants = made.manifest().variants
    graphs = {"canonical": made.entry("canonical", passes)}
    variant = dataclasses.replace(variants["fp32"], graphs=graphs)
    text = render_text(inspect(made.write(tmp_path / "b", variants={"fp32": variant})))
    assert "linear 5 4 1 first note; second" in rows(text)


def test_notes_of_the_export_are_shown(tmp_path: Path) -> None:
    text = render_text(inspect(made.write(tmp_path / "b", notes=("no tokenizer\x1b[31m",))))
    assert "Notes of the export" in text and "no tokenizer" in text and "\x1b" not in text
