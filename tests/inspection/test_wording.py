from __future__ import annotations

import pytest

from accel.inspection import wording
from accel.inspection.report import AttentionLayer
from accel.manifest import PassReport
from accel.spec import TensorSpec


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (25_165_824, "25.2 MB"), (999_999, "1 MB"),
        (1_984_630_784, "1.98 GB"),
        (5e12, "5 TB"), (2.5e16, "25,000 TB"),
    ],
)  # fmt: skip
def test_size(number: float, expected: str) -> None:
    assert wording.size(number) == expected


def test_count() -> None:
    shown = [wording.count(number) for number in (42, 9_999, 10_000, 134_515_008, 1_235_814_400)]
    assert shown == ["42", "9,999", "10 k", "135 M", "1.24 G"]


def test_span() -> None:
    assert wording.span([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_percent() -> None:
    assert [wording.percent(part, 1000) for part in (0, 0.5, 1, 632)] == ["0 %", "< 0.1 %", "0.1 %", "63.2 %"]
    assert wording.percent(0, 0) == "0 %"


def test_printable_spells_out_what_steers_a_terminal() -> None:
    assert wording.printable("\x1b[31mred\u202e\ud800\n") == "\\x1b[31mred\\u202e\\ud800\\n"
    assert wording.printable("größe") == "größe"


@pytest.mark.parametrize(
    ("causal", "window", "expected"),
    [(True, None, "causal"), (True, 512, "causal, last 512"), (False, None, "all"), (False, 64, "64 each side")],
)
def test_mask(causal: bool, window: int | None, expected: str) -> None:
    assert wording.mask(AttentionLayer(0, "a", 4, 2, 8, 0.5, window, None, causal)) == expected


def test_fused() -> None:
    assert wording.fused(PassReport("clean", 9, 5, {"clean": 4})) == "4"
    assert wording.fused(PassReport("attention", 9, 5, {"MHA": 6, "packed": 0, "rotary": 2})) == "MHA 6, rotary 2"


def test_cache_tensors_take_one_line() -> None:
    specs = [TensorSpec("input_ids", "int64", ("T",))]
    specs += [TensorSpec(f"past.{layer}.key", "float32", ("B", 2, "C", 8)) for layer in range(3)]
    specs.append(TensorSpec("past.3.key", "float32", ("B", 4, "C", 8)))
    assert wording.merge_layers(specs) == [
        ("input_ids", "int64", "[T]"),
        ("past.{0-2}.key", "float32", "[B, 2, C, 8]"),
        ("past.{3}.key", "float32", "[B, 4, C, 8]"),
    ]
