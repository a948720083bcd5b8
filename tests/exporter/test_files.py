"""Files beside the weights: sentence-transformers' modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accel.errors import CheckpointError
from accel.exporter.files import _copy_sentence_files


def source(folder: Path, *paths: str) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text("pooling")
    (folder / "1_Pooling" / "pytorch_model.bin").write_text("a pickle")
    (folder / "config.json").write_text("the source's")
    (folder / "model.safetensors").write_text("weights")
    (folder / "modules.json").write_text(
        json.dumps([{"type": "Transformer", "path": ""}, *({"path": p} for p in paths)])
    )
    return folder


def test_module_folders_are_copied_without_pickles_and_the_transformer_is_not(tmp_path: Path) -> None:
    root, out = source(tmp_path / "in", "1_Pooling", ".", "", "absent"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("ours")
    _copy_sentence_files(root, root, out)
    found = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert found.pop("modules.json") == (root / "modules.json").read_text()
    assert found == {"config.json": "ours", "1_Pooling/config.json": "pooling"}


@pytest.mark.parametrize("path", ["../other", "/"])
def test_module_paths_that_lead_out_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "other").mkdir()
    root = source(tmp_path / "in", path)
    with pytest.raises(CheckpointError, match="leads out"):
        _copy_sentence_files(root, root, tmp_path)
