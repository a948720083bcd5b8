"""``scripts/benchmark_cuda.py --plot``: what is drawn, and one line where nothing can be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from accel.bench import gpu_figures
from accel.bench.plot import Panel
from tests.loaded_modules import load_module

TIMES = {"first_token_ms": [3.0, 1.0, 2.0], "per_token_ms": [0.5]}
FIGURES: dict[str, Any] = {
    "gpu": "A GPU",
    "date": "2026-11-20",
    "decoder": [
        {"engine": "cuda", "variant": "fp16", "batch": 1, **TIMES},
        {"engine": "cuda", "variant": "fp16", "batch": 32, "failed": "no memory"},
    ],
    "encoder": [{"batch": 8, "tokens": 128, "call_ms": [0.7, 0.9], "graph_ms": 0.6}],
    "transformers": [
        {"peer": "transformers, eager", "batch": 1, **TIMES},
        {"peer": "BERT, transformers, eager", "batch": 8, "tokens": 128, "ms": [2.0]},
    ],
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])  # both are the script's to change
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return load_module(Path(__file__).resolve().parents[2] / "scripts" / "benchmark_cuda.py")


def written(folder: Path, content: Any) -> str:
    path = folder / "figures.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_every_row_stands_beside_its_peers(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(gpu_figures, "draw_panels", lambda *given: drawn.extend(given))
    assert script.main(["--json", written(tmp_path, FIGURES), "--plot", "x.png"]) == 0
    ours, eager = "accel cuda fp16", "transformers, eager"
    assert drawn[0] == [
        Panel("token, batch 1, ms", [(ours, 0.5, True), (eager, 0.5, False)]),
        Panel("first token, batch 1, ms", [(ours, 2.0, True), (eager, 2.0, False)]),
        Panel(
            "BERT-base fp16 8x128, ms",
            [("accel cuda, on the GPU", 0.6, True), ("accel cuda, NumPy to NumPy", 0.8, True), (eager, 2.0, False)],
        ),
    ]
    assert drawn[1].startswith("A GPU, 2026-11-20;") and drawn[2] == Path("x.png")


def test_a_first_token_after_a_pause_is_called_so(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none was measured in quick succession."""
    drawn: list[Any] = []
    monkeypatch.setattr(gpu_figures, "draw_panels", lambda *given: drawn.extend(given))
    paused = {"per_token_ms": [0.5], "first_token_after_pause_ms": [4.0]}
    row = {"engine": "cuda", "variant": "fp16", "batch": 1}
    figures = {**FIGURES, "decoder": [row | paused, row | {"variant": "bf16"} | paused | TIMES]}
    assert script.main(["--json", written(tmp_path, figures), "--plot", "x.png"]) == 0
    first = [("accel cuda fp16, after a pause", 4.0, True), ("accel cuda bf16", 2.0, True)]
    assert drawn[0][1].bars[:2] == first


def test_it_is_a_picture(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert script.main(["--json", written(tmp_path, FIGURES), "--plot", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


def without(key: str, part: str = "") -> dict[str, Any]:
    """The figures without a key of the file, or of a part's rows."""
    found = json.loads(json.dumps(FIGURES))
    for holder in found[part] if part else [found]:
        del holder[key]
    return dict(found)


OLDER = [
    ({"gpu": "A GPU", "date": "2026-11-20", "engine": {"generate": []}}, "none of the keys decoder, genai, transform"),
    (FIGURES | {"encoder": {"8x128": 0.6}}, "the key 'encoder' holds no list of rows"),
    (FIGURES | {"decoder": [0.5]}, "the key 'decoder' holds no list of rows"),
    (FIGURES | {"encoder": [{"batch": 8, "tokens": 128, "call_ms": 0.7, "graph_ms": 0.6}]}, "a row has other times"),
    (without("gpu"), "the key 'gpu' is missing"),
    (without("graph_ms", "encoder"), "the key 'graph_ms' is missing"),
    (without("batch", "decoder"), "the key 'batch' is missing"),
    ({"decoder": [], "gpu": "A GPU", "date": "2026-11-20"}, "the rows of decoder have no times"),
    ([], "this is no file of figures"),
    ("{", "this is no file of figures: Expecting property name"),
]


@pytest.mark.parametrize(("content", "said"), OLDER)
def test_what_the_file_lacks_is_named(
    script: ModuleType, content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, content)
    assert script.main(["--json", path, "--plot", str(tmp_path / "x.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and f"(at {path})" in line
    assert not (tmp_path / "x.png").exists()


def test_without_a_gpu_nothing_else_is_asked_for(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "gpu_models", lambda: ((), ""))
    assert script.main([]) == 1
    assert capsys.readouterr().err == "there is no NVIDIA GPU here to measure\n"
    for given, models in (([], (("A GPU",), "1")), (["--only"], ((), ""))):  # preparing needs none, but a folder
        monkeypatch.setattr(script, "gpu_models", lambda models=models: models)
        with pytest.raises(SystemExit):
            script.main(given)
        assert "--work says" in capsys.readouterr().err


def test_what_is_missing_is_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    assert script.main(["--json", written(tmp_path, FIGURES), "--plot", "x.png"]) == 2
    assert capsys.readouterr().err == "error: plotting needs matplotlib. pip install matplotlib\n"
    assert script.main(["--json", str(tmp_path / "no.json"), "--plot", "x.png"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--plot", "x.png"])
    assert "--json names" in capsys.readouterr().err
    assert script.main(["--json", written(tmp_path, "{"), "--work", str(tmp_path)]) == 2  # measuring would add to it
    assert "this is no file of figures" in capsys.readouterr().err
