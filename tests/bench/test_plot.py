from __future__ import annotations

from pathlib import Path

import pytest

from accel.bench.plot import Panel, draw_panels, is_ours, plot_results, unit_of
from accel.errors import InputError


def test_a_panel_per_metric_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = {
        "suite": "export",
        "unit": "s, MB",
        "date": "2026-11-20",
        "machine": {"cpu": "a CPU"},
        "settings": {"threads": 2},
        "peers": {name: {"label": name} for name in ("accel", "peer")},
        "groups": [{"accel": {"x: wall time": [1.0], "x: peak RSS": [3.0]}, "peer": {"x: wall time": [2.0]}}],
    }
    path = tmp_path / "new" / "plot.png"
    plot_results([result, result, result], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10_000
    assert (unit_of("x: wall time", result), unit_of("x: peak RSS", result)) == ("s", "MB")


def test_bars_of_all_of_accels_variants_are_ours() -> None:
    result = {"subject": "new", "peers": {"new": {}, "accel": {"ours": True}, "peer": {}}}
    assert [is_ours(result, peer) for peer in ("new", "accel", "peer")] == [True, True, False]
    assert is_ours({"peers": {"accel": {}}}, "accel")  # results of before there was a choice


def test_a_name_of_no_picture_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in (tmp_path / "plot.xyz", tmp_path / "plot", tmp_path):
        with pytest.raises(InputError, match="no name of a picture") as info:
            draw_panels([Panel("time", [("one", 1.0, True)])], "title", name)
        assert info.value.remedy is not None and ".png" in info.value.remedy
    assert not [*tmp_path.iterdir()]
